"""Stage recover: losses against plain transformers and torch, what changes, failures, kills, several processes."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pipelines
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp import checkpoint
from cluscomp.data import texts
from cluscomp.data.texts import Text, split
from cluscomp.errors import InputError
from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.layers import put_in
from cluscomp.forms.linear import compressed
from cluscomp.models.opened import Opened
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.models.predictions import Teacher, divergence
from cluscomp.models.walk import Walk
from cluscomp.plan.meta import MetaModel
from cluscomp.runs.run import Outcome
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED, Objective
from cluscomp.train.whole import _rematerialised_blocks, padded, train_whole

SMALL = [
    "model=tiny", "model.config.num_hidden_layers=2", "data=text", "method.vector_dim=4", "method.codebook_size=32",
    "evaluate.context=32", "evaluate.limit=4", "evaluate.after=[]",
]  # fmt: skip
SCORED = "evaluate.after=[recover]"  # where scores are looked at
RECOVER = [
    "order=[cluster,recover]", "recover.tokens=2560", "recover.length=32", "recover.batch_size=4",
    "recover.accumulation=2", "recover.lr=2e-3", "recover.save_every=2", "recover.held_out=4",
]  # fmt: skip


def overrides(ground: Path, outputs: Path, *more: str) -> list[str]:
    given = [*SMALL, *RECOVER, f"data.file={ground / 'text.txt'}", f"outputs={outputs}", f"cache={ground / 'cache'}"]
    return [*given, *more]


def built(ground: Path, *more: str):
    return pipelines.composed(*overrides(ground, ground / "outputs", *more))


def pipeline(ground: Path, outputs: Path, *more: str) -> Outcome:
    return pipelines.pipeline(*overrides(ground, outputs, *more))


@pytest.fixture(scope="module")
def recovered(ground) -> Outcome:
    """Ten steps of cross-entropy over the codebooks, in ground/outputs."""
    return pipeline(ground, ground / "outputs", SCORED)


def found(outcome: Outcome) -> dict:
    return outcome.record.stages["recover"]["found"]


def stage_hash(outcome: Outcome, stage: str = "recover") -> str:
    return outcome.record.stages[stage]["checkpoint_hash"]


def clustered(outcome: Outcome) -> Path:
    """The checkpoint before the stage."""
    folders = outcome.checkpoint.parents[1].glob("cluster-*")
    hashes = {folder: json.loads((folder / "metrics.json").read_text())["checkpoint_hash"] for folder in folders}
    (made,) = (folder for folder, one in hashes.items() if one == stage_hash(outcome, "cluster"))
    return made / "checkpoint"


def changed(outcome: Outcome) -> set[str]:
    before, after = (load_file(folder / "model.safetensors") for folder in (clustered(outcome), outcome.checkpoint))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype or "norm" in name for name in before)
    return {name for name in before if not torch.equal(before[name], after[name])}


def plain_loss(folder: Path, windows_WT: torch.Tensor) -> float:
    """Mean cross-entropy by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(windows_WT, labels=windows_WT).loss)


def test_the_held_out_loss_falls_and_is_that_of_the_stored_models(recovered, ground):
    numbers = found(recovered)
    assert numbers["steps"] == 10 and numbers["tokens"] == 2560 and numbers["kept"]
    assert numbers["held_out_after"] < numbers["held_out_before"] and numbers["loss_last"] < numbers["loss_first"]
    _, text = split(built(ground).stages["recover"].data.text("calibration"), 0.1)
    windows = texts.test_windows(text, AutoTokenizer.from_pretrained(recovered.checkpoint), length=32, limit=4)
    for key, folder in (("held_out_before", clustered(recovered)), ("held_out_after", recovered.checkpoint)):
        assert numbers[key] == pytest.approx(plain_loss(folder, torch.from_numpy(windows)), rel=1e-5)


def test_blocks_that_are_read_when_they_are_called_leave_nothing_behind(recovered):
    """Of one token's product, too, which is made straight from the codes."""
    model = Opened(recovered.checkpoint, torch.float32, torch.device("cpu")).load_all()
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long))
    stored = [layer.stored for layer in compressed(model).values()]
    assert len(stored) == 14 and all(one.codes.is_meta and one._held is None for one in stored)


def test_hidden_states_of_a_model_of_one_block_are_refused_beforehand(ground, families):
    original = Original(families("llama", num_hidden_layers=1), torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match=r"recover\.hidden=0\.05: .* has one block"):
        built(ground, "recover.hidden=0.05").stages["recover"].check(original)
    built(ground, "recover.hidden=0").stages["recover"].check(original)


def test_held_out_rows_are_the_last_tenth_and_no_training_text():
    text = Text("rows", [f"{number:02} {'x' * 97}" for number in range(40)] + ["same " * 20] * 2, "\n\n")
    first, last = split(text, 0.1)
    assert last.rows == text.rows[-5:] and first.rows == text.rows[:37]
    again, _ = split(Text("rows", [*text.rows[:3], last.rows[0], *text.rows], "\n\n"), 0.1)
    assert last.rows[0] not in again.rows
    with pytest.raises(InputError, match="one row"):
        split(Text("row", ["x"], None), 0.1)


def test_codebooks_change_and_nothing_else(recovered):
    assert changed(recovered) == {
        name for name in load_file(recovered.checkpoint / "model.safetensors") if "codebooks" in name
    }
    assert not list(recovered.checkpoint.parents[0].glob("training"))


def test_of_weights_on_grids_the_scales_change_and_nothing_else(ground):
    """EfficientQAT's end-to-end half."""
    given = [one for one in overrides(ground, ground / "outputs") if not one.startswith("method.")]
    outcome = pipelines.pipeline(*given, "method=rtn", "method.width=3", "method.group=8", "recover.lr=1e-3")
    names = load_file(outcome.checkpoint / "model.safetensors")
    assert changed(outcome) == {name for name in names if name.endswith(".scales")} and found(outcome)["kept"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_trained_where_asked_for_and_what_is_stored_is_what_was_scored(ground, dtype):
    outcome = pipeline(ground, ground / "outputs", "recover.norms=true", f"dtype={dtype}")
    names = load_file(outcome.checkpoint / "model.safetensors").keys()
    assert changed(outcome) == {name for name in names if "codebooks" in name or "norm" in name}
    numbers = found(outcome)
    assert numbers["kept"] and numbers["held_out_after"] < numbers["held_out_before"]
    model = checkpoint.load(outcome.checkpoint, getattr(torch, dtype))  # config.json names the original's
    assert {parameter.dtype for name, parameter in model.named_parameters() if "norm" in name} == {
        getattr(torch, dtype)
    }
    _, text = split(built(ground).stages["recover"].data.text("calibration"), 0.1)
    windows = torch.from_numpy(
        texts.test_windows(text, AutoTokenizer.from_pretrained(outcome.checkpoint), length=32, limit=4)
    )
    with torch.no_grad():
        logits = model(windows).logits.float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert numbers["held_out_after"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_follows_its_schedule(ground, schedule, caplog):
    """Warm-up in the first 2 of 10 steps; the lines in the log say the rate of each step."""
    caplog.set_level("INFO", "cluscomp")
    pipeline(ground, ground / "outputs", f"recover.schedule={schedule}", "recover.warmup=0.2", "recover.lr=1e-3")
    rates = [float(line.split("lr ")[1].split()[0]) for line in caplog.messages if line.startswith("recover  step")]
    assert len(rates) == 10 and rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    end = {"constant": 1e-3, "linear": 1e-3 / 8, "cosine": 3.81e-5}[schedule]  # (1 + cos(7/8 pi)) / 2
    assert rates[-1] == pytest.approx(end, rel=1e-2)


def test_the_split_of_a_step_into_batches_does_not_matter(recovered, ground):
    other = pipeline(ground, ground / "outputs", "recover.batch_size=8", "recover.accumulation=1")
    assert found(other)["loss_last"] == pytest.approx(found(recovered)["loss_last"], rel=1e-5)
    assert found(other)["held_out_after"] == pytest.approx(found(recovered)["held_out_after"], rel=1e-4)


def test_what_is_kept_of_a_pass_changes_no_bit_but_what_is_planned(recovered, ground, tmp_path):
    original = Original(built(ground).model.folder(ground / "cache"), torch.float32, torch.device("cpu"))
    given = overrides(ground, tmp_path, "recover.gradient_checkpointing=false", SCORED)
    kept = pipelines.pipeline(*given)
    assert kept.record.stages["recover"]["checkpoint_hash"] == recovered.record.stages["recover"]["checkpoint_hash"]
    assert found(kept)["attempts"] == found(recovered)["attempts"]
    costs = []
    for again in (True, False):
        outline = MetaModel(original.config, torch.float32, "cpu")
        recovered_as = built(ground, f"recover.gradient_checkpointing={again}")
        recovered_as.stages["cluster"].cost(outline)
        costs.append(recovered_as.stages["recover"].cost(outline))
    again, kept = (cost.device for cost in costs)
    assert kept["inside all blocks"] == 2 * again["inside one block"] and sum(kept.values()) > sum(again.values())
    assert costs[1].work.flops < costs[0].work.flops and "gradient_checkpointing=true" in costs[1].relief


def test_kl_brings_the_model_near_the_original(recovered, ground):
    outcome = pipeline(ground, ground / "outputs", "recover.loss=kl", "recover.teacher_top=300")
    numbers = found(outcome)
    assert numbers["held_out_after"] < numbers["held_out_before"]
    _, text = split(built(ground).stages["recover"].data.text("calibration"), 0.1)
    windows = torch.from_numpy(
        texts.test_windows(text, AutoTokenizer.from_pretrained(outcome.checkpoint), length=32, limit=4)
    )
    original = built(ground).model.folder(ground / "cache")
    with torch.no_grad():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows).logits[:, :-1].log_softmax(-1)
            for folder in (outcome.checkpoint, original)
        )
    by_torch = F.kl_div(student, teacher, reduction="sum", log_target=True) / (4 * 31)
    assert numbers["held_out_after"] == pytest.approx(float(by_torch), rel=1e-3)
    both = pipeline(ground, ground / "outputs", "recover.loss=ce_kl", "recover.teacher_top=300")
    start = found(both)["held_out_before"]
    assert start == pytest.approx(numbers["held_out_before"] + found(recovered)["held_out_before"], rel=1e-4)


def test_hidden_states_come_near_the_originals_and_are_weighed_as_told(ground):
    """OneBit: the blocks' outputs but the last, as vectors of length 1."""
    outcome = pipeline(ground, ground / "outputs", "recover.loss=kl", "recover.hidden=0.5", "recover.teacher_top=300")
    numbers = found(outcome)
    assert numbers["kept"] and numbers["held_out_after"] < numbers["held_out_before"]
    _, text = split(built(ground).stages["recover"].data.text("calibration"), 0.1)
    windows = torch.from_numpy(
        texts.test_windows(text, AutoTokenizer.from_pretrained(outcome.checkpoint), length=32, limit=4)
    )
    with torch.no_grad():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows, output_hidden_states=True)
            for folder in (clustered(outcome), built(ground).model.folder(ground / "cache"))
        )
    (ours,), (theirs,) = (
        [F.normalize(one[:, :-1], dim=-1) for one in out.hidden_states[1:-1]] for out in (student, teacher)
    )
    logs = [out.logits[:, :-1].log_softmax(-1) for out in (student, teacher)]
    expected = F.kl_div(*logs, reduction="sum", log_target=True) + 0.5 * (ours - theirs).square().sum()
    assert numbers["held_out_before"] == pytest.approx(float(expected) / (4 * 31), rel=1e-3)
    idle = built(ground).stages["recover"].without_effect()
    assert idle == {"save_every", "gradient_checkpointing", "teacher_top", "hidden"}


# parts


def test_the_divergence_is_exact_or_that_of_merged_outcomes():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 20, generator=generator)
    log_NV = teacher.log_softmax(-1)
    whole = log_NV.sort(descending=True)
    exact = F.kl_div(student.log_softmax(-1), log_NV, reduction="sum", log_target=True)
    assert float(divergence(student, whole.indices, whole.values)) == pytest.approx(float(exact), rel=1e-5)
    log_NK, top_NK = log_NV.topk(5)
    p, q = (torch.cat([x.gather(-1, top_NK), 1 - x.gather(-1, top_NK).sum(-1, True)], -1)
            for x in (teacher.softmax(-1), student.softmax(-1)))  # fmt: skip
    merged = float(divergence(student, top_NK, log_NK))
    assert merged == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert 0 < merged < float(exact)
    student.requires_grad_(True)
    divergence(student, top_NK, log_NK).backward()
    assert bool(student.grad.isfinite().all())


def test_the_teacher_predicts_what_the_original_does_and_mends_its_parts(tiny_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cluscomp.models.predictions.TOKENS_OF_A_PART", 24)
    windows = torch.randint(1, 257, (5, 12), generator=torch.Generator().manual_seed(1))
    original = Original(tiny_folder, torch.float32, torch.device("cpu"))
    teacher = Teacher(tmp_path, windows, 6)
    teacher.write(Walk(original.model(), original), batch_size=2)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)(windows).logits
    expected = logits.log_softmax(-1).topk(6)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3
    for index in range(5):
        rows = teacher.window(index)
        assert torch.equal(rows["top"], expected.indices[index])
        torch.testing.assert_close(rows["top_log"], expected.values[index])
    content = parts[1].read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(parts[1]).items()}  # not the file's own pages
    parts[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = parts[0].stat().st_mtime_ns
    Teacher(tmp_path, windows, 6).write(Walk(original.model(), original), batch_size=2)
    mended = load_file(parts[1])
    assert all(torch.equal(mended[name], tensors[name]) for name in tensors)
    assert parts[0].stat().st_mtime_ns == before
    assert "damaged" in caplog.text


def with_codebooks(folder: Path):
    """A model of a family with random codes in all its linear layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, block in zip(block_names(model), blocks(model)):
        for layer, dense in linears(block).items():
            O, I = dense.weight.shape
            codes = torch.randint(0, 64, (1, I * -(-O // 4)), generator=generator, dtype=torch.int32)
            books = torch.randn(1, 64, 4, generator=generator) * 0.2
            put_in(
                model, f"{name}.{layer}",
                CodebookWeight.from_codes(codes, books, out_features=O, in_features=I, axis="out"),
            )  # fmt: skip
    model.requires_grad_(False)
    return model.eval()


def example(ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids_BT, "labels": F.pad(ids_BT[:, 1:], (0, 1), value=IGNORED)}


def test_the_loss_and_its_gradient_are_those_of_transformers(family, ids, monkeypatch):
    """Also where logits are more than the head (Gemma 2), with the tokens cut into small parts, and rematerialised."""
    monkeypatch.setattr("cluscomp.train.objective.LOGITS", {"cpu": 257 * 5})
    model = with_codebooks(family)
    trained = Trained(model, codebooks=True, others={})
    trained.start()
    books = {name: layer.stored.codebooks for name, layer in compressed(model).items()}
    objective = Objective(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=ids)
    assert len(books) == len(list(objective.parameters())) == len(compressed(model))
    assert bool(objective._head) != ("gemma2" in model.config.model_type)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in books.items()}
    for parameter in books.values():
        parameter.grad = None
    model.config.attention_dropout = 0.0
    with _rematerialised_blocks(model):
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = objective(**example(ids))["loss"]
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(model(ids, labels=ids).loss.detach()), rel=1e-5)
    for name, parameter in books.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_only_the_inputs_of_blocks_are_kept_for_the_backward_pass(families):
    """Of a model whose dense weights are far larger than its activations."""
    model = with_codebooks(families("llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=True))
    trained = Trained(model, codebooks=True, others={})
    trained.start()
    ids_BT = torch.randint(1, 257, (1, 8), generator=torch.Generator().manual_seed(1))
    objective = Objective(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=ids_BT)
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with _rematerialised_blocks(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(**example(ids_BT))["loss"].backward()
    streams = (len(blocks(model)) + 4) * 8 * 128 * 4
    smallest_matrix = 64 * 128 * 4
    assert max(kept.values()) < smallest_matrix
    assert sum(kept.values()) < 4 * streams < smallest_matrix * len(compressed(model))


def test_padding_changes_no_loss(tiny_folder):
    model = with_codebooks(tiny_folder)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, 257, (length,), generator=generator) for length in (9, 5, 12)]
    examples = [{key: value[0] for key, value in example(row[None]).items()} for row in rows]
    objective = Objective(model, [], cross_entropy=1, kl=0, ids_BT=rows[0][None])
    with torch.no_grad():
        together = objective(**padded(examples), num_items_in_batch=1)["loss"]
        alone = sum(objective(**padded([one]), num_items_in_batch=1)["loss"] for one in examples)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


# failures


def test_a_learning_rate_that_diverges_is_halved_twice_and_then_the_start_is_kept(recovered, ground, caplog):
    outcome = pipeline(ground, ground / "outputs", "recover.lr=1e30")
    numbers = found(outcome)
    assert [attempt["lr"] for attempt in numbers["attempts"]] == [1e30, 5e29, 2.5e29]
    assert not numbers["kept"] and all(attempt["reason"] for attempt in numbers["attempts"])
    assert numbers["held_out_after"] == numbers["held_out_before"] == found(recovered)["held_out_before"]
    assert stage_hash(outcome) == stage_hash(outcome, "cluster")
    assert caplog.text.count("back to the start") == 3 and "stays as it was" in caplog.text


class Hill(torch.nn.Module):
    """Mean (x - 1)^2: the first step of Adam is as long as the learning rate."""

    accepts_loss_kwargs = by_example = True
    learning = staticmethod(nullcontext)  # it is no float16

    def __init__(self, x: torch.nn.Parameter) -> None:
        super().__init__()
        self.x = x

    def forward(self, input_ids, labels, num_items_in_batch):
        return {"loss": (self.x - 1).square().mean() * (labels != IGNORED).sum() / num_items_in_batch}


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_a_halved_learning_rate_may_succeed(ground, tiny_folder, tmp_path, seed):
    """From 0 a step of 2.5 ends further from 1 than it began, one of 1.25 nearer."""
    model = with_codebooks(tiny_folder)
    x = model.model.norm.weight
    x.data.zero_()
    examples = [{key: value[0] for key, value in example(torch.ones(1, 4, dtype=torch.long)).items()}] * 8
    settings = built(ground, "recover.lr=2.5", "recover.warmup=0", "recover.schedule=constant").stages["recover"]
    trained = Trained(model, codebooks=False, others={"model.norm.weight": x})
    numbers = train_whole(
        model, trained, Hill(x), examples, examples[:1], settings, tokens=32, name="hill", folder=tmp_path, seed=seed
    )
    assert [attempt["lr"] for attempt in numbers["attempts"]] == [2.5, 1.25]
    assert [attempt["kept"] for attempt in numbers["attempts"]] == [False, True]
    assert numbers["attempts"][0]["held_out"] == pytest.approx(1.5**2)
    assert numbers["held_out_before"] == 1 and numbers["held_out_after"] == pytest.approx(0.25**2)
    assert model.model.norm.weight is x and x.tolist() == pytest.approx([1.25] * len(x)) and not x.requires_grad


def test_what_cannot_work_is_refused(ground, monkeypatch):
    with pytest.raises(InputError, match="do not make one step"):
        built(ground, "recover.tokens=100")
    with pytest.raises(InputError, match=r"recover\.length=600"):
        pipeline(ground, ground / "outputs", "recover.length=600", "recover.tokens=10000")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size=4 is no multiple of 3"):
        built(ground).stages["recover"].check(None)


# kills


def kill_at(forks, ground: Path, outputs: Path, pattern: str, *more: str) -> None:
    """Kill the command as soon as a file of this pattern is there."""
    forks.kill_at(outputs, pattern, *overrides(ground, outputs, *more))
    assert not list(outputs.glob("recover-*/metrics.json")), "too late: the stage had ended"


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits_and_what_is_not_whole_is_left_out(ground, forks, tmp_path, caplog):
    """Killed in training with KL; then gone on from the last state, from one half written, and from an altered one."""
    long = ["recover.loss=ce_kl", "recover.norms=true"]
    whole = pipeline(ground, tmp_path / "whole", *long)
    killed = tmp_path / "killed"
    kill_at(forks, ground, killed, "recover-*/training/attempt-0/checkpoint-4/whole.json", *long)
    for name in ("marker", "altered", "nothing"):
        shutil.copytree(killed, tmp_path / name)
    newest = {
        name: sorted(tmp_path.glob(f"{name}/recover-*/training/attempt-0/checkpoint-*/whole.json"))[-1]
        for name in ("marker", "altered")
    }
    newest["marker"].unlink()
    optimizer = newest["altered"].with_name("optimizer.pt")
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    for path in tmp_path.glob("nothing/recover-*/training/attempt-0"):
        shutil.rmtree(path)
    caplog.set_level("INFO", "cluscomp")
    for name in ("killed", "marker", "altered", "nothing"):
        caplog.clear()
        again = pipeline(ground, tmp_path / name, *long)
        assert ("goes on after step" in caplog.text) == (name != "nothing")
        assert ("is not whole" in caplog.text) == (name in ("marker", "altered")) or name == "killed"
        assert stage_hash(again) == stage_hash(whole), name
        assert found(again) == found(whole), name


@pytest.mark.slow
def test_failed_attempts_survive_a_kill(ground, forks, tmp_path):
    steep = ["recover.lr=1e30"]
    kill_at(forks, ground, tmp_path / "killed", "recover-*/training/attempts.json", *steep)
    whole, again = (pipeline(ground, tmp_path / name, *steep) for name in ("whole", "killed"))
    assert found(again) == found(whole) and stage_hash(again) == stage_hash(whole)


# processes


TORCHRUN = """
from cluscomp.__main__ import main
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

one = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
elastic_launch(LaunchConfig(nproc_per_node=2, run_id="two", start_method="fork", monitor_interval=0.1, **one), main)()
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(recovered, ground, forks, tmp_path):
    """Started as `torchrun --standalone --nproc_per_node 2` does, by its agent, but forked."""
    more = ["recover.loss=ce_kl", "recover.tokens=1024", SCORED]
    done = forks.run(*overrides(ground, tmp_path, *more), script=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("record ") == 1
    (path,) = tmp_path.glob("run-*/record.json")
    record = json.loads(path.read_text())
    alone = pipeline(ground, ground / "outputs", *more)
    numbers = record["stages"]["recover"]["found"]
    assert record["stages"]["cluster"]["checkpoint_hash"] == stage_hash(alone, "cluster")
    assert numbers["loss_last"] == pytest.approx(found(alone)["loss_last"], rel=1e-4)
    assert numbers["held_out_after"] == pytest.approx(found(alone)["held_out_after"], rel=1e-3)
    assert record["scores"][0]["value"] == pytest.approx(alone.record.scores[0].value, rel=1e-3)


def test_codebooks_that_layers_share_are_trained_once(ground):
    """By hand: two blocks with one codebook of 32 x 4 numbers each."""
    more = ["method.share=block", "order=[cluster,block_finetune,recover]", "block_finetune=quick"]
    more += ["block_finetune.samples=4", "block_finetune.length=32", "block_finetune.norms=false"]
    outcome = pipeline(ground, ground / "shared", *more)
    numbers = found(outcome)
    assert numbers["trained_parameters"] == 2 * 32 * 4 and numbers["kept"]
    assert numbers["held_out_after"] < numbers["held_out_before"]
    names = {name for name in load_file(outcome.checkpoint / "model.safetensors") if "codebooks" in name}
    assert changed(outcome) == names and len(names) == 2
    assert outcome.record.size["ledger"]["codebooks"] == 2 * 32 * 4 * 16
    assert outcome.record.stages["block_finetune"]["found"]["kept"] == 0
