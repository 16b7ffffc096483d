"""Stage cluster with a method that looks at the layers' inputs: what it is shown, and that nothing else decides."""

import shutil
from dataclasses import replace

import pytest
import torch
from layers import made_by
from pydantic import ValidationError
from reference.prices import by_autograd
from reference.recipe import IDLE, STORED
from transformers import AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.data.files import FileText
from cluscomp.data.texts import calibration_windows
from cluscomp.errors import InputError
from cluscomp.forms.linear import compressed
from cluscomp.methods.cluscomp import ClusComp
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.models.walk import Walk
from cluscomp.plan import dry
from cluscomp.plan.meta import MetaModel
from cluscomp.plan.places import Place
from cluscomp.solve.allocate import Option
from cluscomp.solve.drift import corrected
from cluscomp.solve.layer import Seen
from cluscomp.stages import Job, clustering
from cluscomp.stages.allocation import Allocation, ByFormula, ByGates
from cluscomp.stages.cluster import Cluster
from cluscomp.stages.clustering import chosen_table, compress_block, layer_seed
from cluscomp.stages.menus import Menus
from cluscomp.stages.observing import Following, observe, seen_first, through
from cluscomp.stages.prices import prices
from cluscomp.store.records import write_sealed

CPU = torch.device("cpu")
CALIBRATION = {"samples": 5, "length": 12, "batch_size": 2}
KMEANS = {"iterations": 3, "init": "kd", "over_relaxation": 1.9, "move_centroids": True}
BY_OUTPUT = {"weighting": "diagonal", "assign": "hessian", "damping": 0.01, "shrinkage": 0.0, "least_squares": 5}
BY_OUTPUT |= {"descent": 1}


def method(**changed) -> ClusComp:
    return ClusComp(**{"bits": None, "vector_dim": 4, "codebook_size": 16} | KMEANS | STORED | BY_OUTPUT | changed)


def stage(
    text: FileText,
    prefix: str = "original",
    scope: str = "block",
    drift: float = 0.0,
    damping: float = 0.1,
    price: str = "error",
    **changed,
) -> Cluster:
    settings = {
        "prefix": prefix,
        "drift": drift,
        "drift_damping": damping,
        "price": price,
        "statistics": 8.0,
        "rotation": "none",
    } | CALIBRATION
    settings["beside"] = IDLE["beside"]
    return Cluster(method=method(**changed), allocation=Allocation(scope=scope), data=text, **settings)


def run(cluster: Cluster, original: Original, folder):
    model = original.model()
    found = cluster.run(model, Job(folder, 0, original))
    return model, found


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".stored." in name}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def windows(text: FileText, original: Original) -> torch.Tensor:
    """What the stage calibrates on."""
    return torch.from_numpy(
        calibration_windows(text.text("calibration"), original.tokenizer, samples=5, length=12, seed=0)
    )


def second_moments(model, ids_WT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every linear layer's inputs, by hooks on the whole model of plain transformers, in float64."""
    sums: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(_module, args):
            x_TI = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x_TI.T @ x_TI / ids_WT.numel()

        return hook

    for index, block in enumerate(blocks(model)):
        for name, linear in linears(block).items():
            linear.register_forward_pre_hook(note(f"{index}.{name}"))
    with torch.no_grad():
        model(ids_WT)
    return sums


def test_each_layer_is_shown_the_second_moment_of_its_inputs(family, text):
    original = Original(family, torch.float32, CPU)
    cluster = stage(text)
    ids_WT = windows(text, original)
    expected = second_moments(AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32), ids_WT)
    walk = Walk(original.load_all())
    stream, seen = [walk.embed(part) for part in ids_WT.split(2)], {}
    for index in range(len(walk)):
        stream, statistics = observe(cluster.sees, walk, index, stream, layers=[*linears(walk.blocks[index])])
        seen |= {f"{index}.{name}": statistic for name, statistic in statistics.items()}
    assert seen.keys() == expected.keys()
    for name, statistic in seen.items():
        assert statistic.tokens == 60
        torch.testing.assert_close(statistic.matrix_II.double(), expected[name], rtol=1e-3, atol=1e-5)
    same = [name for name in seen if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len({id(seen[name]) for name in same}) == 3  # one for the three projections of each block


def test_the_calibration_text_is_met_better_than_without_looking_at_the_inputs(tiny_folder, text, tmp_path):
    original = Original(tiny_folder, torch.float32, CPU)
    with torch.no_grad():
        ids = windows(text, original)
        expected = original.load_all()(ids).logits
        free = stage(text, weighting="none", assign="nearest", least_squares=0, descent=0)
        errors = [
            float((run(cluster, original, tmp_path / str(number))[0](ids).logits - expected).square().mean())
            for number, cluster in enumerate((stage(text), free))
        ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("prefix, drift", [("original", 0.0), ("compressed", 0.0), ("compressed", 0.5)])
def test_a_stage_that_lost_some_parts_ends_with_the_same_bits(tiny_folder, text, tmp_path, prefix, drift):
    original = Original(tiny_folder, torch.float32, CPU)
    whole, found = run(stage(text, prefix, drift=drift), original, tmp_path)
    for number in (1, 2):
        (tmp_path / f"block-00{number}.safetensors").unlink()
    again, refound = run(stage(text, prefix, drift=drift), original, tmp_path)
    assert equal(state(whole), state(again)) and found == refound


def test_the_prefix_counts(tiny_folder, text, tmp_path):
    """Block 0 sees the same either way, the last one does not."""
    original = Original(tiny_folder, torch.float32, CPU)
    one, other = (
        [state(block) for block in blocks(run(stage(text, prefix), original, tmp_path / prefix)[0])]
        for prefix in ("original", "compressed")
    )
    assert equal(one[0], other[0]) and not equal(one[2], other[2])


def test_the_correction_is_the_least_squares_answer_to_the_drift():
    """Undamped and followed all the way, no other weight makes less of a difference on the tokens seen."""
    draw = torch.Generator().manual_seed(0)
    x_TI, weight_OI = torch.randn(200, 6, generator=draw), torch.randn(4, 6, generator=draw)
    y_TI = x_TI @ (torch.eye(6) + 0.3 * torch.randn(6, 6, generator=draw)) + 0.1 * torch.randn(200, 6, generator=draw)
    seen = Seen({"moment"})
    for part in range(4):
        rows = slice(50 * part, 50 * part + 50)
        seen.add(y_TI[rows].view(2, 25, 6), x_TI[rows].view(2, 25, 6))
    found_OI = corrected(weight_OI, seen.drift.correction(seen.matrix_II, 1e-9), 1.0)
    expected_IO = torch.linalg.lstsq(y_TI.double(), (x_TI @ weight_OI.T).double()).solution
    torch.testing.assert_close(found_OI, expected_IO.T.float(), rtol=1e-4, atol=1e-4)
    half_OI = corrected(weight_OI, seen.drift.correction(seen.matrix_II, 1e-9), 0.5)
    torch.testing.assert_close(half_OI, (weight_OI + found_OI) / 2)
    assert float((corrected(weight_OI, seen.drift.correction(seen.matrix_II, 1e9), 1.0) - weight_OI).norm()) < 1e-6


def test_weights_that_follow_the_drift_bring_the_model_nearer_the_original(tiny_folder, text, tmp_path):
    """On the calibration text; and each layer sees what is compressed before it, in its own block, too."""
    original = Original(tiny_folder, torch.float32, CPU)
    with torch.no_grad():
        ids = windows(text, original)
        expected = original.load_all()(ids).logits
        errors = []
        for drift in (0.0, 0.7):
            model, _ = run(stage(text, "compressed", drift=drift), original, tmp_path / str(drift))
            errors.append(float((model(ids).logits - expected).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "chosen", [method(), RoundToNearest(bits=None, width=4, group=16, symmetric=False)], ids=["codebooks", "rounding"]
)
def test_inputs_are_looked_at_again_behind_each_part_of_a_block(tiny_folder, text, chosen):
    """What the last layer sees is what the compressed layers before it make."""
    original = Original(tiny_folder, torch.float32, CPU)
    model = original.load_all()
    walk, block = Walk(model), blocks(model)[0]
    stream = [walk.embed(part) for part in windows(text, original).split(2)]
    _, originals = through(walk, 0, stream)
    seen = []

    def again(layers):
        found = observe(frozenset({"moment"}), walk, 0, stream, layers=layers, originals=originals)
        seen.append(found[1])
        return found

    _, first = observe(frozenset({"moment"}), walk, 0, stream, layers=[*linears(block)], originals=originals)
    places = MetaModel(original.config, torch.float32, "cpu").places()[0]
    dense = linears(block).keys()
    compress_block(chosen, block, "block", 0, first, places, None, Following(0.5, 0.1, again))
    assert [len(one) for one in seen] == [1, 2, 1]  # o after q, k and v; gate and up; down
    assert all(float(one.drift.correction(one.matrix_II, 0.1).norm()) == 0 for one in first.values())
    last = seen[-1]["mlp.down_proj"]
    assert float(last.drift.correction(last.matrix_II, 0.1).norm()) > 0 and dense == compressed(block).keys()
    undrifted = torch.cat([inputs["mlp.down_proj"].flatten(0, 1) for inputs in originals])
    assert not torch.allclose(last.matrix_II, undrifted.T @ undrifted / len(undrifted))


def test_drift_needs_a_compressed_prefix(text):
    with pytest.raises(ValidationError, match=r"drift=0\.5 needs prefix=compressed"):
        stage(text, drift=0.5)


def test_without_a_statistic_no_text_is_read_or_counted(tiny_folder, tmp_path):
    """The file of the text does not even exist."""
    nowhere = FileText(name="text", file=str(tmp_path / "no.txt"), test_file=None)
    cluster = stage(nowhere, weighting="none", assign="nearest", least_squares=0, descent=0)
    original = Original(tiny_folder, torch.float32, CPU)
    cluster.check(original)
    model, found = run(cluster, original, tmp_path)
    assert len(compressed(model)) == 21 and "calibration" not in found
    assert found["distribution_by_layer"].keys() == compressed(model).keys()
    assert all(0 < layer["entropy"] <= 4 and layer["kurtosis"] > 1 for layer in found["distribution_by_layer"].values())
    idle = {"drift", "drift_damping", "price", "rotation", "beside", "statistics"}
    assert (
        cluster.learns_from() is None
        and cluster.without_effect() == {"data", "samples", "length", "batch_size", "prefix"} | idle
    )
    assert stage(nowhere).without_effect() == idle
    assert stage(nowhere, "compressed", drift=0.1).without_effect() == idle - {"drift", "drift_damping"}


@pytest.mark.parametrize("storage", ["float8", "int8"])
def test_codebooks_of_8_bits_are_half_as_large_and_come_back(tiny_folder, text, tmp_path, storage):
    original = Original(tiny_folder, torch.float32, CPU)
    model, _ = run(stage(text, storage=storage), original, tmp_path)
    checkpoint.save(model, original.tokenizer, tmp_path / "checkpoint")
    again = checkpoint.load(tmp_path / "checkpoint", torch.float32)
    layer, loaded = (next(iter(compressed(m).values())).stored for m in (model, again))
    assert loaded.codebooks.dtype == layer.codebooks.dtype and loaded.codebooks.element_size() == 1
    assert layer.ledger()["codebooks"] == 16 * 4 * 8 + 32
    assert equal(state(model), state(again))
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


# layers that share a codebook, and bits that are shared out


def codebooks(block) -> list[set[str]]:
    """The layers of a block by the codebook they use."""
    groups: dict[int, set[str]] = {}
    for name, layer in compressed(block).items():
        groups.setdefault(id(layer.stored.codebooks), set()).add(name.rpartition(".")[2])
    return list(groups.values())


@pytest.mark.parametrize("share", ["none", "input", "block"])
def test_layers_share_codebooks_as_asked_for_with_and_without_data(tiny_folder, text, tmp_path, share):
    projections = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    expected = {
        "none": [{name} for names in projections for name in names],
        "input": projections,
        "block": [set.union(*projections)],
    }
    original = Original(tiny_folder, torch.float32, CPU)
    for number, free in enumerate(({}, {"weighting": "none", "assign": "nearest", "least_squares": 0})):
        model, found = run(stage(text, share=share, **free), original, tmp_path / str(number))
        for block in blocks(model):
            assert sorted(codebooks(block), key=sorted) == sorted(expected[share], key=sorted)
        assert len(found["chosen"]) == 3 * len(expected[share])
        assert {(c["vector_dim"], c["codebook_size"]) for c in found["chosen"].values()} == {(4, 16)}


def test_a_block_whose_layers_share_nothing_is_compressed_layer_by_layer(tiny_folder, text, tmp_path):
    """As the method does with one weight."""
    original = Original(tiny_folder, torch.float32, CPU)
    model, _ = run(stage(text), original, tmp_path)
    walk = Walk(original.load_all())
    stream = [walk.embed(part) for part in windows(text, original).split(2)]
    _, statistics = observe(stage(text).sees, walk, 0, stream, layers=[*linears(walk.blocks[0])])
    for name, layer in compressed(blocks(model)[0]).items():
        generator = torch.Generator().manual_seed(layer_seed(0, f"model.layers.0.{name}"))
        weight_OI = walk.blocks[0].get_submodule(name).weight.detach()
        alone = made_by(method(), weight_OI, statistics[name], generator)
        assert equal(dict(alone.state_dict()), dict(layer.stored.state_dict()))


def test_a_codebook_of_a_block_serves_layers_of_any_size(tiny_folder, text, tmp_path):
    """One matrix a thousand times as large as the others: each layer is met as well as if all were alike."""
    original = Original(tiny_folder, torch.float32, CPU)
    walk = Walk(original.load_all())
    stream = [walk.embed(part) for part in windows(text, original).split(2)]
    cluster = stage(text, share="block")
    _, statistics = observe(cluster.sees, walk, 1, stream, layers=[*linears(walk.blocks[1])])
    errors = {}
    for factor in (1.0, 1000.0):
        block = blocks(original.load_all())[1]
        block.self_attn.v_proj.weight.data *= factor
        squares = compress_block(cluster.method, block, "block", 0, dict(statistics))["squares"]
        errors[factor] = {name: error / size for name, (error, size) in squares.items()}
    for name, error in errors[1.0].items():
        assert errors[1000.0][name] == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("share", ["input", "block"])
def test_a_stage_that_shares_and_lost_some_parts_ends_with_the_same_bits(tiny_folder, text, tmp_path, share):
    original = Original(tiny_folder, torch.float32, CPU)
    whole, found = run(stage(text, share=share), original, tmp_path)
    (tmp_path / "block-001.safetensors").unlink()
    again, refound = run(stage(text, share=share), original, tmp_path)
    assert equal(state(whole), state(again)) and found == refound
    assert [codebooks(block) for block in blocks(whole)] == [codebooks(block) for block in blocks(again)]


@pytest.mark.parametrize("share", ["none", "block"])
def test_bits_shared_out_over_the_model_are_no_more_and_do_less_damage(tiny_folder, text, tmp_path, share):
    """By the settings' own measure, foreseen; and, but for gates, which look at outputs, after clustering in full."""
    original = Original(tiny_folder, torch.float32, CPU)
    target = {"bits": 3.0, "vector_dim": None, "codebook_size": None, "share": share, "allocation": "fill"}
    target |= {"assign": "nearest", "least_squares": 0, "descent": 0, "weighting": "none"}
    ways = {
        "uniform": Allocation(scope="block"),
        "block": Allocation(scope="block"),
        "model": Allocation(scope="model"),
    }
    ways |= {formula: ByFormula(scope="model", formula=formula) for formula in ("opq", "marginal")}
    ways |= {"gates": ByGates(scope="model", levels=3, steps=4)}
    bits, damages, told = {}, {}, {}
    for scope, allocation in ways.items():
        inside = {"allocation": "uniform"} if scope == "uniform" else {}
        sharing = replace(stage(text, **target | inside), allocation=allocation)
        model, found = run(sharing, original, tmp_path / scope)
        weights = sum(layer.out_features * layer.in_features for layer in compressed(model).values())
        bits[scope] = sum(sum(layer.stored.ledger().values()) for layer in compressed(model).values()) / weights
        damages[scope] = 0.0
        for index, block in enumerate(blocks(model)):
            dense = linears(blocks(original.load_all())[index])
            for name, layer in compressed(block).items():
                weight_OI = dense[name].weight
                error = (layer.stored(torch.float32).detach() - weight_OI).square().sum() / weight_OI.square().mean()
                damages[scope] += float(error)
        told[scope] = found.get("shared_out")
    for scope in ("model", "opq", "marginal", "gates"):
        assert told[scope]["spent"] == pytest.approx(bits[scope]) and told[scope]["left"] >= 0
        assert told[scope]["limit"] == 3.0 >= bits[scope]
        assert damages[scope] < damages["uniform"] or scope == "gates"
        menus = [menu for block in Menus(tmp_path / scope, 3)._blocks for menu in block]
        taken, first = ways[scope].share_out(menus, 3.0), [menu.options[0] for menu in menus]
        assert sum(one.damage for one in taken) <= sum(one.damage for one in first)
    assert damages["model"] < damages["block"]


def test_prices_are_those_of_plain_transformers_and_autograd(family, text, tmp_path):
    """Mean over tokens but the first of |g|^2 |z|^2 / O, for outputs z and their gradient g of the summed loss.

    Of linear layers, and of blocks.
    """
    original = Original(family, torch.float32, CPU)
    ids_WT = windows(text, original)
    found = prices(Walk(original.model(), original), [*ids_WT.split(2)], tmp_path)
    assert found == pytest.approx(by_autograd(original.load_all(), ids_WT), rel=1e-3)
    assert prices(Walk(original.model()), [], tmp_path) == found  # as it was left


def test_bits_go_where_errors_cost_the_loss_most(tiny_folder, text, tmp_path):
    """A price of a thousandth for the layers of the last block: they get fewer bits than before, others more."""
    original = Original(tiny_folder, torch.float32, CPU)
    target = {"bits": 3.0, "vector_dim": None, "codebook_size": None, "allocation": "fill"}
    spent = {}
    for way in ("error", "loss"):
        folder = tmp_path / way
        if way == "loss":
            found = prices(Walk(original.model(), original), [*windows(text, original).split(2)], tmp_path)
            last = f"{block_names(original.model())[-1]}."
            lowered = {name: price / (1000 if name.startswith(last) else 1) for name, price in found.items()}
            write_sealed(folder / "prices.json", {"prices": lowered})
        model, numbers = run(stage(text, scope="model", price=way, **target), original, folder)
        assert numbers["shared_out"]["left"] >= 0
        bits = [
            sum(sum(layer.stored.ledger().values()) for layer in compressed(block).values()) for block in blocks(model)
        ]
        spent[way] = bits[-1] / sum(bits)
    assert spent["loss"] < 0.95 * spent["error"]


def test_a_price_needs_a_method_that_shares_bits_out(text, tiny_folder):
    with pytest.raises(InputError, match=r"cluster\.price=loss needs .* bits="):
        stage(text, price="loss").check(Original(tiny_folder, torch.float32, CPU))  # shapes by hand


@pytest.mark.parametrize(
    ("price", "allocation"),
    [("error", Allocation(scope="model")), ("loss", ByGates(scope="model", levels=3, steps=4))],
)
def test_a_killed_run_that_shares_bits_out_over_the_model_goes_on_with_the_same_bits(
    tiny_folder, text, tmp_path, price, allocation
):
    original = Original(tiny_folder, torch.float32, CPU)
    target = {"bits": 3.0, "vector_dim": None, "codebook_size": None, "allocation": "fill"}
    sharing = replace(stage(text, price=price, **target), allocation=allocation)
    whole, found = run(sharing, original, tmp_path / "whole")
    folder = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "menus-001.json").unlink()  # ended while the second block was asked
    for part in folder.glob("block-*"):
        part.unlink()
    again, refound = run(sharing, original, folder)
    assert equal(state(whole), state(again)) and found == refound
    (folder / "block-002.safetensors").unlink()  # ended while the last block was compressed
    again, refound = run(sharing, original, folder)
    assert equal(state(whole), state(again)) and found == refound


def test_only_what_is_made_first_is_looked_at_before(tiny_folder, text, tmp_path, monkeypatch):
    """With bits shared out before, nothing else of the first look would be used."""
    original = Original(tiny_folder, torch.float32, CPU)
    target = {"bits": 3.0, "vector_dim": None, "codebook_size": None, "allocation": "fill"}
    sharing = replace(stage(text, "compressed", drift=0.3, **target), allocation=Allocation(scope="model"))
    asked = []

    def noted(*args, layers, **more):
        asked.append(len(layers))
        return observe(*args, layers=layers, **more)

    monkeypatch.setattr(clustering, "observe", noted)
    found, numbers = run(sharing, original, tmp_path / "first")
    assert asked[-4:] == [3, 1, 2, 1]  # of the last block, which hands nothing on
    monkeypatch.setattr(clustering, "seen_first", lambda places, share: [*places])
    everything, refound = run(sharing, original, tmp_path / "all")
    assert asked[-4:] == [7, 1, 2, 1] and equal(state(found), state(everything)) and numbers == refound


def test_what_is_seen_first():
    places = {"q": Place(8, 4, 0), "k": Place(8, 4, 0), "o": Place(8, 4, 1), "down": Place(8, 8, 2)}
    option = Option(1, 0.0, {})
    each = [([layer], option) for layer in places]
    assert seen_first(places, each) == ["q", "k"]
    assert seen_first(places, [(["q", "k"], option), *each[2:]]) == ["q", "k"]
    assert seen_first(places, None) == [*places]  # a method may look at all before it begins
    assert seen_first(places, [(["q", "o"], option), (["k"], option), (["down"], option)]) == [*places]
    assert seen_first({**places, "down": Place(8, 8, 2, stack="experts")}, each) == [*places]


def test_gates_need_text_whatever_the_method_looks_at_and_are_planned(tiny_folder, text):
    original = Original(tiny_folder, torch.float32, CPU)
    blind = {"bits": 3.0, "vector_dim": None, "codebook_size": None, "allocation": "fill"}
    blind |= {"assign": "nearest", "least_squares": 0, "descent": 0, "weighting": "none"}
    without = stage(text, scope="model", **blind)
    gates = replace(without, allocation=ByGates(scope="model", levels=3, steps=4))
    assert without.learns_from() is None and gates.learns_from() is not None
    assert "samples" in without.without_effect() and "samples" not in gates.without_effect()
    with pytest.raises(InputError, match=r"data\.file=nothing\.txt"):
        replace(gates, data=FileText(name="none", file="nothing.txt", test_file=None)).check(original)
    costs = [one.cost(MetaModel(original.config, torch.float32, "cpu")) for one in (without, gates)]
    assert costs[0].work.flops < costs[1].work.flops and sum(costs[0].device.values()) < sum(costs[1].device.values())


def test_a_method_whose_bits_cannot_be_shared_out_is_refused(tiny_folder, text):
    original = Original(tiny_folder, torch.float32, CPU)
    with pytest.raises(InputError, match=r"allocation\.scope=model needs .* bits="):
        stage(text, scope="model").check(original)  # shapes by hand
    plain = RoundToNearest(bits=3.0, width=None, group=None, symmetric=False)
    with pytest.raises(InputError, match=r"allocation\.scope=model needs .*cluscomp"):
        Cluster(
            method=plain,
            allocation=Allocation(scope="model"),
            **{key: value for key, value in IDLE.items() if key != "allocation"},
        ).check(original)


@pytest.mark.parametrize("share", ["none", "input"])
def test_a_filled_block_takes_all_its_bits_and_does_less_damage(tiny_folder, text, tmp_path, share):
    original = Original(tiny_folder, torch.float32, CPU)
    target = {"bits": 3.0, "vector_dim": None, "codebook_size": None, "share": share, "weighting": "none"}
    target |= {"assign": "nearest", "least_squares": 0, "descent": 0}
    bits, damages = {}, {}
    for allocation in ("uniform", "fill"):
        model, _ = run(stage(text, allocation=allocation, **target), original, tmp_path / allocation)
        size = sum(layer.out_features * layer.in_features for layer in compressed(model).values())
        bits[allocation] = sum(sum(layer.stored.ledger().values()) for layer in compressed(model).values()) / size
        damages[allocation] = 0.0
        for block, dense in zip(blocks(model), blocks(original.load_all())):
            for name, layer in compressed(block).items():
                weight_OI = linears(dense)[name].weight.detach()
                error = (layer.stored(torch.float32).detach() - weight_OI).square().sum() / weight_OI.square().mean()
                damages[allocation] += float(error)
    assert bits["uniform"] < bits["fill"] <= 3.0 and damages["fill"] < damages["uniform"]


@pytest.mark.parametrize("share", ["none", "input", "block"])
def test_shapes_as_of_gaussian_weights_are_those_of_the_plan_and_fill_the_block(tiny_folder, text, tmp_path, share):
    original = Original(tiny_folder, torch.float32, CPU)
    target = {"bits": 3.0, "vector_dim": None, "codebook_size": None, "share": share, "allocation": "fill"}
    target |= {"measure": False}
    clustering = stage(text, **target)
    model, found = run(clustering, original, tmp_path)
    outline = MetaModel(original.config, torch.float32, "cpu")
    planned = dry.compress(clustering.method, outline.places()[0], torch.float32)
    stored = {name: layer.stored for name, layer in compressed(blocks(model)[0]).items()}
    assert planned.exact and planned.stored.keys() == stored.keys()
    assert all(planned.stored[name].spec() == weight.spec() for name, weight in stored.items())
    size = sum(layer.out_features * layer.in_features for layer in compressed(model).values())
    bits = sum(sum(layer.stored.ledger().values()) for layer in compressed(model).values()) / size
    assert 2.6 < bits <= 3.0 and found["chosen"]


def test_with_shapes_by_hand_there_is_nothing_to_fill(tiny_folder, text, tmp_path):
    original = Original(tiny_folder, torch.float32, CPU)
    ways = [run(stage(text, allocation=way), original, tmp_path / way)[0] for way in ("uniform", "fill")]
    for (name, layer), (_, other) in zip(*(compressed(model).items() for model in ways), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values())), name


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"share": "input", "storage": "int8"}, "share=input needs method.storage=float16"),
        ({"axis": "in"}, "axis=in needs method.weighting=none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        method(**changed)


def test_what_was_chosen_is_told_in_one_row_for_each_kind_of_layer():
    found = {"layers.1.q": {"size": 16, "bits": 2.5}, "layers.10.q": {"size": None, "bits": 2.5}}
    found |= {"layers.2.q": {"size": 8, "bits": 2.75}, "layers.2.k": {"size": 8, "bits": 3.0}}
    table = chosen_table(found, [f"layers.{number}" for number in range(11)])
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()][2:] == [
        ["q", "none to 16", "2.500 to 2.750", "3"], ["k", "8", "3.000", "1"],
    ]  # fmt: skip


@pytest.mark.parametrize("target", [{}, {"bits": 3.0, "vector_dim": None, "codebook_size": None}])
@pytest.mark.parametrize("share", ["none", "block"])
def test_inputs_that_overflow_are_told_with_the_layer(tiny_folder, text, target, share):
    block = blocks(Original(tiny_folder, torch.float32, CPU).load_all())[0]
    statistics = {}
    for name, layer in linears(block).items():
        statistics[name] = Seen({"moment"})
        statistics[name].add(torch.full((2, layer.in_features), 1e30))
    with pytest.raises(InputError, match=r"block\.self_attn\.q_proj.*: its inputs .* have NaN or infinity"):
        compress_block(stage(text, share=share, **target).method, block, "block", 0, statistics)
