"""Stage decompose: what it leaves is what it says, by plain transformers; which models it cuts; kills, plan, record."""

import json

import pytest
import torch
from pipelines import composed, pipeline
from reference.recipe import IDLE
from transformers import AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.formats.export import export
from cluscomp.forms.layers import size_of
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.models import dense
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.models.sources import read_config
from cluscomp.plan.meta import MetaModel
from cluscomp.report.learned import tokens
from cluscomp.report.names import method_name
from cluscomp.runs.preparation import planned
from cluscomp.solve import modular
from cluscomp.stages import Job
from cluscomp.stages.blockwise import dense_blocks
from cluscomp.stages.cluster import Cluster
from cluscomp.stages.decompose import Decompose
from cluscomp.stages.parts import read_part

CPU = torch.device("cpu")
HEADS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}  # along which dimension of the weight they lie


def stage(text, **changed) -> Decompose:
    settings = {"samples": 16, "length": 12, "batch_size": 4, "units": 0.5, "heads": 1.0, "ridge": 0.01}
    settings |= {"widths": "uniform", "temperature": 0.1} | changed
    return Decompose(data=text, **settings)


def cut(decompose: Decompose, folder, work):
    """The finished stage on a model's folder: what it found, and the dense folder that it leaves."""
    original = Original(folder, torch.float32, CPU)
    model, job = original.model(), Job(work, 0, original)
    decompose.check(original)
    found = decompose.run(model, job)
    dense.save(model, dense_blocks(work, model), original, work / "checkpoint")
    return found, work / "checkpoint"


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def spread(weight: torch.Tensor, dim: int, size: int, kept: list[int]) -> torch.Tensor:
    """The rows (or columns) of heads at their places among the original's, zeros between."""
    heads = weight.unflatten(dim, (-1, len(kept)))
    shape = [*heads.shape]
    shape[dim + 1] = size
    return heads.new_zeros(shape).index_copy(dim + 1, torch.tensor(kept), heads).flatten(dim, dim + 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_smaller_model_is_the_original_with_its_weights_at_their_places_and_zeros_between(
    families, text, ids, tmp_path, family
):
    """Frequencies, scale and sizes in the config are those of what stayed."""
    folder = families(family)
    found, left = cut(stage(text, heads=0.5), folder, tmp_path)
    smaller, whole = opened(left), opened(folder)
    assert (smaller.config.intermediate_size, smaller.config.head_dim) == (24, 4) == (found["units"], found["heads"])
    places = {name: [*found["pairs"], *(pair + 4 for pair in found["pairs"])] for name in ("q_proj", "k_proj")}
    places |= {name: [0, 1, 2, 3] for name in ("v_proj", "o_proj")}
    for small, large in zip(blocks(smaller), blocks(whole), strict=True):
        for name, dim in HEADS.items():
            weight = getattr(small.self_attn, name).weight
            getattr(large.self_attn, name).weight.copy_(spread(weight, dim, 8, places[name]))
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(large.mlp, name).weight.zero_()
            weight[: 24 if name != "down_proj" else None, : 24 if name == "down_proj" else None] = getattr(
                small.mlp, name
            ).weight
    torch.testing.assert_close(smaller(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_family_can_lose_units_and_what_is_lost_is_told(family, text, tmp_path):
    """What the config says a block's MLP has, it has; with all units kept nothing is changed by a bit."""
    found, left = cut(stage(text), family, tmp_path / "half")
    before, after = opened(family), opened(left)
    assert found["units"] == 24 and found["heads"] is found["pairs"] is None
    numbers = [sum(p.numel() for p in model.parameters()) for model in (before, after)]
    gone = sum(p.numel() for name, p in before.named_parameters() if "mlp" in name or ".fc" in name)
    assert gone * 0.4 < numbers[0] - numbers[1] <= gone / 2
    for block in found["blocks"]:
        assert 0 < block["mlp"] < block["mlp_dropped"]
    _, same = cut(stage(text, units=1.0), family, tmp_path / "all")
    state = opened(same).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())


def test_a_stage_that_lost_some_blocks_ends_with_the_same_bits(tiny_folder, text, tmp_path):
    original, decompose = Original(tiny_folder, torch.float32, CPU), stage(text, heads=0.5, widths="influence")
    parts = [tmp_path / f"block-00{index}.safetensors" for index in range(3)]
    first = original.model()
    found = decompose.run(first, Job(tmp_path, 0, original))
    assert all(parameter.is_meta for block in blocks(first) for parameter in block.parameters())
    written = [{name: part.clone() for name, part in read_part(path).others.items()} for path in parts]
    parts[1].unlink()
    assert decompose.run(original.model(), Job(tmp_path, 0, original)) == found
    for name in ("pairs", "influence"):
        (tmp_path / f"{name}.json").unlink()
    parts[0].unlink()
    assert decompose.run(original.model(), Job(tmp_path, 0, original)) == found
    for path, before in zip(parts, written):
        after = read_part(path).others
        assert all(torch.equal(after[name], before[name]) for name in before) and after.keys() == before.keys()


@torch.no_grad()
def test_widths_by_influence_are_as_many_units_in_all_and_load_with_what_is_made_of_them(
    tiny_folder, text, ids, tmp_path
):
    """Where blocks turn their input is where units stay; the folder is an original, and what becomes of it loads."""
    found, left = cut(stage(text, widths="influence", temperature=0.02), tiny_folder, tmp_path / "work")
    widths, influence = found["widths"], found["influence"]
    hidden = opened(tiny_folder)(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len({*widths}) == 3 and sum(widths) == 3 * found["units"] == 3 * 24
    assert sorted(range(3), key=widths.__getitem__) == sorted(range(3), key=influence.__getitem__)
    x, y = hidden[0].double(), hidden[1].double()
    cosines = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
    assert modular.influence(x, y) == pytest.approx(1 - float(cosines.mean()))
    loaded, original = checkpoint.load(left, torch.float32), Original(left, torch.float32, CPU)
    assert [block.mlp.down_proj.in_features for block in blocks(loaded)] == widths
    expected = original.load_all()(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    model = original.model()
    method = RoundToNearest(bits=None, width=8, group=None, symmetric=False)
    Cluster(method=method, **{key: value for key, value in IDLE.items() if key != "method"}).run(
        model, Job(tmp_path / "cluster", 0, original)
    )
    checkpoint.save(model, original.tokenizer, tmp_path / "compressed")
    again = checkpoint.load(tmp_path / "compressed", torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)
    outline = MetaModel(read_config(tmp_path / "compressed"), torch.float32, "cpu")
    assert outline.size().linear_bits_per_weight == size_of(again).linear_bits_per_weight
    again.dequantize()
    expected = again(ids).logits
    for place in ("dense", "once more"):
        again.save_pretrained(tmp_path / place)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype=torch.float32)
        assert torch.equal(again(ids).logits, expected)
    for folder in (left, tmp_path / "compressed"):
        with pytest.raises(InputError, match=r"mlp.* other shapes than config\.json .* format=dense has no"):
            export(folder, format="dense", output=tmp_path / "out")
    config = json.loads((left / "config.json").read_text())
    config["quantization_config"]["shapes"]["model.layers.0.mlp.up_proj"][0] += 1
    (left / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="altered"):
        checkpoint.load(left)
    for wrong in ({"model.layers.0.mlp.up_proj": [0, 32]}, {"model.norm": [2, 32]}):
        config["quantization_config"] |= {"shapes": wrong, "seal": None}
        (left / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"shapes of config\.json: model\.[a-z0-9_.]* = .* is no linear layer's"):
            Original(left, torch.float32, CPU).model()


def test_what_stays_of_the_mlp_is_rows_of_the_original_in_the_dtype_of_its_file(tiny_folder, text, tmp_path):
    opened(tiny_folder).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for path in tiny_folder.glob("token*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    outline = MetaModel(Original(tmp_path / "model", torch.float32, CPU).config, torch.float32, "cpu")
    stage(text).cost(outline)
    assert outline.size().model_bits_per_weight == 16
    _, left = cut(stage(text), tmp_path / "model", tmp_path / "work")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    after = AutoModelForCausalLM.from_pretrained(left, dtype="auto").state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name in block_names(opened(tiny_folder)):
        for layer in ("gate_proj", "up_proj"):
            rows = {tuple(row) for row in before[f"{name}.mlp.{layer}.weight"].float().tolist()}
            assert {tuple(row) for row in after[f"{name}.mlp.{layer}.weight"].float().tolist()} < rows


def test_it_comes_before_cluster_and_is_planned_told_and_counted(ground, tmp_path):
    arguments = [
        "model=tiny", "data=text", f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", "method=rtn",
        f"outputs={tmp_path}", "bits=3", "order=[decompose,cluster,block_finetune]", "decompose.units=0.5",
        "decompose.heads=0.75", "decompose.samples=8", "decompose.length=32", "evaluate.context=32",
        "evaluate.limit=4", "block_finetune=quick", "block_finetune.length=32", "block_finetune.samples=4",
        "block_finetune.epochs=1", "block_finetune.norms=false",
    ]  # fmt: skip
    plan = planned(composed(*arguments))
    record = pipeline(*arguments).record
    assert [row.name for row in plan.rows][1:4:2] == ["decompose", "cluster"] and plan.rows[1].ram > 0
    assert plan.size.linear_bits_per_weight == record.size["linear_bits_per_weight"] <= 3
    assert plan.checkpoint_bytes == pytest.approx(record.size["checkpoint_bytes"], rel=0.02)  # norms of ones in 16 bits
    names = ["original + decompose", "decompose + RTN", "decompose + RTN + block_finetune"]
    assert [method_name(record, name) for name in record.stages] == names
    assert tokens(record, "cluster") == {"calibration tokens": 8 * 32, "training tokens": 0.0}
    found = record.stages["decompose"]["found"]
    assert (found["units"], found["heads"], len(found["pairs"]), len(found["blocks"])) == (48, 12, 6, 3)
    scores = {score.after: score.value for score in record.scores if score.metric == "perplexity"}
    assert scores.keys() == {"original", "decompose", "cluster", "block_finetune"}


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("family", "changed", "words"),
    [
        ("qwen3", {"heads": 0.5}, r"heads=0.5: Qwen3ForCausalLM cannot be cut: .*q_norm.*; decompose\.heads=1 leaves"),
        ("opt", {"heads": 0.5}, "heads=0.5: OPTForCausalLM cannot be cut: the attention of its blocks is not made of"),
        ("gemma3_text", {"heads": 0.5}, "Gemma3ForCausalLM cannot be cut: not all dimensions .* one list of fixed"),
        ("gpt_neox", {"units": 0.5}, "units=0.5: GPTNeoXForCausalLM cannot be cut: none of these make the MLP of all"),
        ("llama", {"units": 0.01}, "units=0.01: none of 48 units of an MLP would be left"),
        ("llama", {"heads": 0.1}, "heads=0.1: none of 8 dimensions of a head would be left"),
        (
            "llama",
            {"units": 0.1, "widths": "influence"},
            "units=0.1: with decompose.widths=influence no MLP loses more",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_work(families, text, family, changed, words):
    original = Original(families(family, **SMALL if family == "gpt_neox" else {}), torch.float32, CPU)
    with pytest.raises(InputError, match=rf"^decompose\..*{words}"):
        stage(text, **changed).check(original)
