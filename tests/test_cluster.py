"""Stage cluster with a method that looks at the layers' inputs: what it is shown, and that nothing else decides."""

import pytest
import torch
from reference.recipe import STORED
from transformers import AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.blocks import Walk
from cluscomp.data import FileText, calibration_windows
from cluscomp.methods.cluscomp import ClusComp
from cluscomp.models import Original, blocks, compressed, linears
from cluscomp.stages import Job
from cluscomp.stages.cluster import Cluster

CPU = torch.device("cpu")
CALIBRATION = {"samples": 5, "length": 12, "batch_size": 2}
KMEANS = {"iterations": 3, "init": "kd", "over_relaxation": 1.9, "move_centroids": True}
BY_OUTPUT = {"weighting": "diagonal", "assign": "hessian", "damping": 0.01, "least_squares": 5, "descent": 1}


def method(**changed) -> ClusComp:
    return ClusComp(**{"bits": None, "vector_dim": 4, "codebook_size": 16} | KMEANS | STORED | BY_OUTPUT | changed)


def stage(text: FileText, prefix: str = "original", **changed) -> Cluster:
    return Cluster(method=method(**changed), data=text, prefix=prefix, **CALIBRATION)


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
        stream, statistics = cluster.observe(walk, index, stream, count=True)
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


@pytest.mark.parametrize("prefix", ["original", "compressed"])
def test_a_stage_that_lost_some_parts_ends_with_the_same_bits(tiny_folder, text, tmp_path, prefix):
    original = Original(tiny_folder, torch.float32, CPU)
    whole, found = run(stage(text, prefix), original, tmp_path)
    for number in (1, 2):
        (tmp_path / f"block-00{number}.safetensors").unlink()
    again, refound = run(stage(text, prefix), original, tmp_path)
    assert equal(state(whole), state(again)) and found == refound


def test_the_prefix_counts(tiny_folder, text, tmp_path):
    """Block 0 sees the same either way, the last one does not."""
    original = Original(tiny_folder, torch.float32, CPU)
    one, other = (
        [state(block) for block in blocks(run(stage(text, prefix), original, tmp_path / prefix)[0])]
        for prefix in ("original", "compressed")
    )
    assert equal(one[0], other[0]) and not equal(one[2], other[2])


def test_without_a_statistic_no_text_is_read_or_counted(tiny_folder, tmp_path):
    """The file of the text does not even exist."""
    nowhere = FileText(name="text", file=str(tmp_path / "no.txt"), test_file=None)
    cluster = stage(nowhere, weighting="none", assign="nearest", least_squares=0, descent=0)
    original = Original(tiny_folder, torch.float32, CPU)
    cluster.check(original)
    model, found = run(cluster, original, tmp_path)
    assert len(compressed(model)) == 21 and "calibration" not in found
    assert cluster.inputs() == {} and cluster.idle() == {"data", "samples", "length", "batch_size", "prefix"}
    assert stage(nowhere).idle() == set()


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
