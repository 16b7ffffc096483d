"""block_finetune on a tiny clustered model: its losses against plain transformers with hooks, and what it does when a
block cannot be trained.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from reference.recipe import IDLE, NO_DATA, STORED
from transformers import AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.data.files import FileText
from cluscomp.forms.codebook import sub_vectors
from cluscomp.forms.linear import compressed, storage_dtype
from cluscomp.methods.cluscomp import ClusComp
from cluscomp.models.original import Original, blocks
from cluscomp.models.walk import Walk
from cluscomp.stages import Job
from cluscomp.stages.block_finetune import BlockFinetune
from cluscomp.stages.block_finetuning import finetune_block
from cluscomp.stages.block_windows import batches, steps
from cluscomp.stages.cluster import Cluster
from cluscomp.train.masters import by_mean, fit

CPU = torch.device("cpu")
SAMPLES, LENGTH = 6, 12
METHOD = ClusComp(
    bits=None, vector_dim=4, codebook_size=16, iterations=5, init="kd", over_relaxation=1.0, move_centroids=True,
    **STORED, **NO_DATA,
)  # fmt: skip


@pytest.fixture(scope="module")
def clustered(families, tmp_path_factory):
    """Builder of clustered models: clustered(family, dtype) gives the original and a new compressed model."""
    made = {}

    def build(family="llama", dtype=torch.float32):
        if (family, dtype) not in made:
            original = Original(families(family), dtype, CPU)
            model = original.model()
            folder = tmp_path_factory.mktemp("clustered")
            Cluster(method=METHOD, **IDLE).run(model, Job(folder / "parts", 0, original))
            checkpoint.save(model, original.tokenizer, folder / "checkpoint")
            made[family, dtype] = original, folder / "checkpoint"
        original, folder = made[family, dtype]
        return original, checkpoint.load(folder, dtype)

    return build


def stage(text: FileText, **changed) -> BlockFinetune:
    values = {
        "samples": SAMPLES, "length": LENGTH, "target": "fp_stream", "norms": False, "learns": "values",
        "codes": "fixed", "moves": 0.01, "codes_lr": 0.01, "weights_lr": 1e-3, "held_out": 0, "skip": 0,
        "loss": "mse", "epochs": 4, "batch_size": 2, "order": "fixed", "lr": 3e-3, "weight_decay": 0.0,
        "schedule": "cosine", "warmup": 0.0, "clip": None, "streams": "memory",
    }  # fmt: skip
    return BlockFinetune(data=text, **values | changed)


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def windows(original: Original, text: FileText) -> torch.Tensor:
    return torch.from_numpy(stage(text).windows(original.tokenizer, 0))


@torch.no_grad()
def streams(model, ids_WT: torch.Tensor, replaced: dict[int, torch.Tensor] | None = None):
    """What enters and what leaves each block, by forward hooks; `replaced` hands a block something else."""
    entering, leaving = [], []

    def before(index):
        def hook(_module, args, kwargs):
            args = (replaced[index], *args[1:]) if replaced and index in replaced else args
            entering.append(args[0])
            return args, kwargs

        return hook

    handles = []
    for index, block in enumerate(blocks(model)):
        handles.append(block.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(
            block.register_forward_hook(lambda _m, _a, out: leaving.append(out[0] if isinstance(out, tuple) else out))
        )
    model(ids_WT)
    for handle in handles:
        handle.remove()
    return entering, leaving


def mse(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).square().mean())


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("target", ["fp_stream", "same_input", "both"])
def test_the_losses_are_those_of_plain_transformers(clustered, text, tmp_path, family, target):
    """Of the model as it lies on the disk, against the original's own stream, the same input, or both."""
    original, model = clustered(family)
    ids_WT = windows(original, text)
    start = streams(model, ids_WT)[1][0]
    found = stage(text, target=target, batch_size=4, lr=1e-3).run(model, Job(tmp_path, 0, original))["blocks"]
    checkpoint.save(model, original.tokenizer, tmp_path / "checkpoint")
    dense = AutoModelForCausalLM.from_pretrained(original.folder, dtype=torch.float32).eval()
    student_in, student_out = streams(checkpoint.load(tmp_path / "checkpoint"), ids_WT)
    own = streams(dense, ids_WT)[1]
    fed_alike = [streams(dense, ids_WT, {index: student_in[index]})[1][index] for index in range(len(own))]
    targets = {"fp_stream": [own], "same_input": [fed_alike], "both": [own, fed_alike]}[target]
    for index, numbers in enumerate(found):
        assert numbers["after"] == pytest.approx(sum(mse(student_out[index], t[index]) for t in targets), rel=1e-4)
        square = sum(mse(t[index], torch.zeros(())) for t in targets) / len(targets)
        assert numbers["square"] == pytest.approx(square, rel=1e-4)
        assert numbers["after"] < numbers["before"] and numbers["attempts"] == 1 and numbers["reasons"] == []
        assert 0 < numbers["moved"] < 0.1
    assert found[0]["before"] == pytest.approx(sum(mse(start, t[0]) for t in targets), rel=1e-4)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16), ("opt", torch.float16)]
)
def test_norms_learn_and_are_stored_as_they_were_measured(clustered, text, tmp_path, family, dtype):
    original, model = clustered(family, dtype)
    before = tensors(model)
    found = stage(text, norms=True, lr=1e-3).run(model, Job(tmp_path, 0, original))["blocks"]
    after = tensors(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = [f"{name}." for name in compressed(model)]
    books = {f"{name}stored.codebooks" for name in inside}
    norms = {name for name in before if "layers." in name and not name.startswith(tuple(inside))}
    assert books <= changed and changed - books <= norms and len(changed - books) >= len(norms) - 2
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert all(storage_dtype(after[name]).itemsize == 2 for name in changed)
    checkpoint.save(model, original.tokenizer, tmp_path / "checkpoint")
    loaded = checkpoint.load(tmp_path / "checkpoint", dtype)
    assert same(tensors(loaded), after)
    dense = AutoModelForCausalLM.from_pretrained(original.folder, dtype=dtype).eval()
    pairs = zip(streams(loaded, windows(original, text))[1], streams(dense, windows(original, text))[1])
    losses = [mse(student, own) for student, own in pairs]
    assert [numbers["after"] for numbers in found] == pytest.approx(losses, rel=0.02)
    assert all(numbers["after"] < numbers["before"] for numbers in found)


def test_without_norms_only_codebooks_change(clustered, text, tmp_path):
    original, model = clustered()
    before = tensors(model)
    stage(text, target="both", order="shuffled").run(model, Job(tmp_path, 0, original))
    after = tensors(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".codebooks")}
    assert all(after[name].dtype == before[name].dtype for name in before)


def test_each_centroid_goes_against_the_mean_of_its_weights_gradients(clustered, text, tmp_path):
    """One step of plain gradient descent on the dense weights' gradients, averaged by hand."""
    original, model = clustered()
    walk, ids_WT = Walk(model), windows(original, text)[:2]
    layers = compressed(walk.blocks[0])
    entering, change_gradient = walk.embed(ids_WT), by_mean(walk.blocks[0])
    dense = {name: layer.stored(torch.float32).detach().requires_grad_(True) for name, layer in layers.items()}
    codebooks = {name: layer.stored.codebooks for name, layer in layers.items()}
    for layer in layers.values():
        layer.stored.to_masters()
    before = {name: codebook.detach().clone() for name, codebook in codebooks.items()}

    def loss(_: None) -> torch.Tensor:
        return walk.apply(0, walk.blocks[0], entering).square().mean()

    plain = {"lr": 0.1, "weight_decay": 0.5, "schedule": "constant", "warmup": 0.0, "clip": None, "half": False}
    assert fit(list(codebooks.values()), loss, [None], **plain, change_gradient=change_gradient) is None
    after = {name: codebook.detach().clone() for name, codebook in codebooks.items()}
    for name, layer in layers.items():
        layer.stored.codebooks.data = before[name]
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = torch.nn.Parameter(dense[name].detach())
        walk.blocks[0].set_submodule(name, linear)
        dense[name] = linear.weight
    loss(None).backward()
    for name, layer in layers.items():
        stored, gradient = layer.stored, dense[name].grad
        vectors = sub_vectors(gradient, stored.codebooks.shape[2], stored.axis)
        codes = stored.unpacked()[0]
        for centroid in codes.unique().tolist():
            mean_D = vectors[codes == centroid].mean(0)
            change_D = (before[name] - after[name])[0, centroid] / 0.1
            torch.testing.assert_close(change_D, mean_D, rtol=1e-3, atol=1e-6)


def test_averaged_gradients_lower_the_loss_of_every_block(clustered, text, tmp_path):
    original, model = clustered()
    found = stage(text, learns="means", loss="relative", lr=30.0).run(model, Job(tmp_path, 0, original))
    assert all(numbers["after"] < numbers["before"] for numbers in found["blocks"])


def trained(clustered, text, folder: Path, seed=0, dtype=torch.float32, **changed):
    original, model = clustered(dtype=dtype)
    folder.mkdir()
    found = stage(text, **changed).run(model, Job(folder, seed, original))
    return tensors(model), found["blocks"]


def one_block(clustered, text, **changed):
    """Block 0 trained towards the original's output: what was found, and its codebooks."""
    original, model = clustered()
    walk, ids_WT = Walk(model), windows(original, text)
    entering = torch.cat([walk.embed(rows) for rows in ids_WT.split(2)])
    walk.embed(ids_WT[:1])
    dense = AutoModelForCausalLM.from_pretrained(original.folder, dtype=torch.float32).eval()
    target = streams(dense, ids_WT)[1][0]
    found = finetune_block(stage(text, **changed), walk, 0, entering, [target], torch.empty_like(entering), 0)
    return found, [layer.stored.codebooks for layer in compressed(walk.blocks[0]).values()]


def test_the_relative_loss_is_the_same_loss_in_other_units(clustered, text):
    """AdamW does not see the unit, but for its eps; clipping does: c relative is c times the mean square plain."""
    close = {"rtol": 1e-2, "atol": 1e-3}
    free, books = one_block(clustered, text)
    relative, relative_books = one_block(clustered, text, loss="relative")
    assert relative["before"] == free["before"] and relative["square"] == free["square"]
    assert all(torch.allclose(*pair, **close) for pair in zip(books, relative_books))
    clip = 0.03  # exceeded in some of the steps alone
    _, plain_books = one_block(clustered, text, clip=clip * free["square"])
    _, relative_books = one_block(clustered, text, loss="relative", clip=clip)
    assert all(torch.allclose(*pair, **close) for pair in zip(plain_books, relative_books))
    assert not all(torch.allclose(*pair, **close) for pair in zip(books, relative_books))


def test_a_target_of_zeros_is_no_division_by_zero(clustered, text):
    original, model = clustered()
    walk = Walk(model)
    entering = walk.embed(windows(original, text)[:2])
    walk.embed(windows(original, text)[:1])
    entering = torch.cat([entering] * 3)
    leaving = torch.empty_like(entering)
    chosen = stage(text, loss="relative")
    found = finetune_block(chosen, walk, 0, entering, [torch.zeros_like(entering)], leaving, 0)
    assert found["square"] == 0 and found["after"] < found["before"]


def test_shuffled_windows_come_once_an_epoch_and_in_the_order_of_the_seed(clustered, text, tmp_path):
    shuffled = stage(text, order="shuffled", batch_size=4)
    drawn = steps(shuffled, "0 1")
    assert [len(rows) for rows in drawn] == [4, 2] * 4
    epochs = [torch.cat(drawn[start : start + 2]).tolist() for start in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert all(torch.equal(one, two) for one, two in zip(drawn, steps(shuffled, "0 1")))
    assert steps(stage(text), "0 1") == [slice(0, 2), slice(2, 4), slice(4, 6)] * 4
    first, _ = trained(clustered, text, tmp_path / "first", order="shuffled")
    again, _ = trained(clustered, text, tmp_path / "again", order="shuffled")
    fixed, _ = trained(clustered, text, tmp_path / "fixed")
    assert same(first, again) and not same(first, fixed)


@pytest.mark.parametrize("target", ["fp_stream", "both"])
def test_streams_on_disk_change_no_bit_and_leave_the_last_ones(clustered, text, tmp_path, target):
    memory, numbers = trained(clustered, text, tmp_path / "memory", target=target, order="shuffled", batch_size=4)
    disk, found = trained(
        clustered, text, tmp_path / "disk", target=target, order="shuffled", batch_size=4, streams="disk"
    )
    assert same(memory, disk) and numbers == found
    notes = [json.loads((tmp_path / name / "streams.json").read_text()) for name in ("memory", "disk")]
    assert notes[0] == notes[1] and set(notes[0]["hashes"]) == {"student", "original"}
    size = SAMPLES * LENGTH * 32 * 4
    assert {path.name: path.stat().st_size for path in (tmp_path / "memory").glob("*.stream")} == {
        "student-003.stream": size, "original-003.stream": size,
    }  # fmt: skip


# what goes wrong


@pytest.mark.parametrize("where", ["entering", "target"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_hidden_state_that_is_not_finite_leaves_the_block_as_it_was(clustered, text, where, value, caplog):
    original, model = clustered()
    before = tensors(model)
    walk = Walk(model)
    entering = walk.embed(windows(original, text))
    targets = entering + 1
    {"entering": entering, "target": targets}[where][4, 3, 2] = value
    walk.embed(windows(original, text)[:2])
    leaving = torch.empty_like(entering)
    found = finetune_block(stage(text), walk, 0, entering, [targets], leaving, 0)
    assert found["kept"] and found["attempts"] == 0 and found["lr"] is None
    (reason,) = found["reasons"]
    assert "before" in reason and "block 0 keeps the codebooks" in caplog.text
    assert same(tensors(model), before)
    walk.embed(windows(original, text))
    with torch.no_grad():
        expected = [walk.apply(0, walk.blocks[0], entering[rows]) for rows in batches(stage(text))]
    assert torch.equal(leaving.nan_to_num(), torch.cat(expected).nan_to_num())


def test_a_block_that_never_gets_better_keeps_the_codebooks_after_three_attempts(clustered, text, tmp_path, caplog):
    original, model = clustered()
    before = tensors(model)
    found = stage(text, norms=True, lr=1e4).run(model, Job(tmp_path, 0, original))
    assert found["kept"] == 3 and same(tensors(model), before)
    for numbers in found["blocks"]:
        assert numbers["kept"] and numbers["attempts"] == 3 and len(numbers["reasons"]) == 3
        assert numbers["after"] == numbers["before"] and numbers["lr"] is None and numbers["moved"] == 0
    for rate in ("1.0e+04", "5.0e+03", "2.5e+03"):
        assert caplog.text.count(f"learning rate {rate}") == 3


def test_half_the_learning_rate_may_do(clustered, text):
    """At the highest rate that works once halved, the second attempt is a plain run with half the rate."""
    for rate in (0.2 / 2**halvings for halvings in range(8)):
        found, books = one_block(clustered, text, lr=rate, schedule="constant")
        if not found["kept"] and found["attempts"] == 2:
            break
    plain, plain_books = one_block(clustered, text, lr=rate / 2, schedule="constant")
    assert found["attempts"] == 2 and plain["attempts"] == 1 and plain["lr"] == found["lr"] == rate / 2
    assert "ended at" in found["reasons"][0] and plain["reasons"] == []
    assert found["after"] == plain["after"] and all(torch.equal(*pair) for pair in zip(books, plain_books))
