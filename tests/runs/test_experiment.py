"""The tiny pipeline from settings to record: resume, keys and hashes, kills, and a golden of its numbers.

Losses are checked against plain transformers models with forward hooks; everything else run against run.
"""

import json
import logging
import shutil
import typing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp.data.texts import calibration_windows
from cluscomp.errors import InputError
from cluscomp.runs.experiment import config_of, key_settings, settings_of, stage_keys, without_places
from cluscomp.runs.run import Outcome
from cluscomp.stages import clustering
from cluscomp.store.records import SCHEMA, protocol, read, read_sealed, write_sealed

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny.json"
SMALL = [
    "model=tiny", "data=text", "method=cluscomp_data_free", "method.vector_dim=4", "method.codebook_size=32",
    "evaluate.context=32", "evaluate.limit=8",
]  # fmt: skip
TUNED = [
    "order=[cluster,block_finetune]", "block_finetune=quick", "block_finetune.length=32", "block_finetune.samples=8",
    "block_finetune.epochs=4", "block_finetune.norms=false",
    "block_finetune.batch_size=4", "block_finetune.lr=3e-3",
]  # fmt: skip


def overrides(ground: Path, outputs: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.file={ground / 'text.txt'}", f"outputs={outputs}", f"cache={ground / 'cache'}", *more]


def original(ground: Path) -> Path:
    """The folder of the tiny model that all runs without a model of their own read."""
    return pipelines.composed(*overrides(ground, ground / "outputs")).model.folder(ground / "cache")


def pipeline(ground: Path, outputs: Path, *more: str) -> Outcome:
    return pipelines.pipeline(*overrides(ground, outputs, *more))


@pytest.fixture(scope="module")
def tuned(ground) -> Outcome:
    """The run with both stages, in ground/outputs."""
    return pipeline(ground, ground / "outputs", *TUNED)


def another(value: Any, annotation: Any) -> Any:
    """A value of the same setting that is allowed and differs."""
    choices = [choice for choice in typing.get_args(annotation) if choice != value]
    if isinstance(value, str):
        return choices[0]
    if isinstance(value, bool):
        return not value
    return 0.5 if value is None else value + 1 if isinstance(value, int) else value / 2 + 0.1


TINY_TUNED = ["model=tiny", *TUNED, "method=cluscomp_data_free", "method.vector_dim=4", "method.codebook_size=32"]


@pytest.mark.parametrize("assign", ["nearest", "hessian"])  # by the method, for some need no text
def test_every_setting_that_decides_the_result_makes_another_key(assign):
    """So no state of other settings is ever used again. Where streams lie decides nothing, nor a text nobody reads."""
    experiment = pipelines.composed(*TINY_TUNED, f"method.assign={assign}")
    another_text = pipelines.composed(*TINY_TUNED, "data=text", f"data.file={__file__}")
    before = stage_keys(experiment, {"model": "m"})
    of_another_model = stage_keys(experiment, {"model": "n"})
    assert of_another_model.keys() == before.keys() and not {*of_another_model.values()} & {*before.values()}
    tried = 0
    for stage, whole in experiment.stages.items():
        parts = {"method": getattr(whole, "method", None), "allocation": getattr(whole, "allocation", None)}
        for part, settings in ({None: whole} | parts).items():
            names = [field.name for field in fields(settings)] if settings is not None and stage in before else []
            for field in names:
                if part is None and field in ("method", "allocation", "beside"):
                    continue
                if field == "data":
                    changes = {"data": another_text.stages[stage].data}
                elif field == "bits":
                    changes = {"bits": 3.0, "vector_dim": None, "codebook_size": None}
                elif field == "axis":
                    changes = {"axis": "in", "assign": "nearest"}
                elif field == "drift":
                    changes = {"prefix": "compressed", "drift": 0.5}
                else:
                    hints = typing.get_type_hints(type(settings))
                    changes = {field: another(getattr(settings, field), hints[field])}
                changed = replace(settings, **changes)
                changed = changed if part is None else replace(whole, **{part: changed})
                assert changed != whole
                other = replace(experiment, stages=experiment.stages | {stage: changed})
                after = stage_keys(other, {"model": "m"})
                unread = assign == "nearest" and stage == "cluster" and part is None
                unread &= field not in ("drift", "price", "rotation")
                idle = unread or field in ("streams", "statistics", "drift_damping", "moves", "codes_lr", "weights_lr")
                expected = set() if idle else set(experiment.order[experiment.order.index(stage) :])
                assert {name for name in before if before[name] != after[name]} == expected, (stage, part, field)
                tried += 1
    assert tried > 40


ZEROS = """
import torch

from cluscomp.methods.rtn import RoundToNearest
from cluscomp.settings import settings


@settings
class Zeros(RoundToNearest):
    \"\"\"Every weight is zero.\"\"\"

    def stored(self, weight_OI, *rest):
        return super().stored(torch.zeros_like(weight_OI), *rest)
"""


def test_a_setting_of_a_method_that_decides_nothing_is_in_no_key():
    """So runs from before there was shrinkage are found again."""
    plain, shrunk = (pipelines.composed(*TINY_TUNED, f"method.shrinkage={share}") for share in (0.0, 0.1))
    assert "shrinkage" not in key_settings(plain.stages["cluster"])["method"]
    assert key_settings(shrunk.stages["cluster"])["method"]["shrinkage"] == 0.1


def test_two_methods_with_equal_settings_share_nothing(ground, tmp_path, monkeypatch):
    """One of them is the user's own, in a module on the path."""
    (tmp_path / "zeros.py").write_text(ZEROS)
    monkeypatch.syspath_prepend(tmp_path)
    common = ["model=tiny", "data=text", "method=rtn", "bits=4", "evaluate.context=32", "evaluate.limit=2"]
    given = [*common, f"data.file={ground / 'text.txt'}", f"outputs={tmp_path / 'out'}", f"cache={ground / 'cache'}"]
    other = [*given, "method._target_=zeros.Zeros", "trust=zeros"]
    first, second = pipelines.pipeline(*given), pipelines.pipeline(*other)
    assert first.path != second.path and stage_hash(first, "cluster") != stage_hash(second, "cluster")
    errors = [made.record.stages["cluster"]["found"]["relative_error"] for made in (first, second)]
    assert errors[1] == pytest.approx(1.0) and errors[0] < 0.1
    classes = [made.record.config["stages"]["cluster"]["method"]["class"] for made in (first, second)]
    assert classes == ["cluscomp.methods.rtn.RoundToNearest", "zeros.Zeros"]
    assert settings_of(pipelines.composed(*given)) != settings_of(pipelines.composed(*other))
    assert second.record.choices["method"] == {"yaml": "rtn", "differs": {"_target_": "zeros.Zeros"}}


def test_a_setting_of_a_users_own_may_be_named_as_one_of_runs(ground, tmp_path, monkeypatch):
    """`ranks` of a run decides nothing of its result, `ranks` of a method does."""
    named = ZEROS.replace('is zero."""', 'is zero."""\n\n    ranks: int')
    (tmp_path / "ranked_zeros.py").write_text(named)
    monkeypatch.syspath_prepend(tmp_path)
    given = ["model=tiny", "data=text", "method=rtn", "bits=4", f"data.file={ground / 'text.txt'}"]
    given += ["method._target_=ranked_zeros.Zeros", "trust=ranked_zeros"]
    one, other, more = (
        pipelines.composed(*given, f"+method.ranks={ranks}", f"ranks={processes}")
        for ranks, processes in ((1, 1), (2, 1), (1, 2))
    )
    assert settings_of(one) == settings_of(more) != settings_of(other)
    assert config_of(other)["stages"]["cluster"]["method"]["ranks"] == 2


def test_cells_tell_folders_of_one_name_apart_and_records_name_neither(tmp_path):
    given = ["bits=3", "model=hub", "data=text"]
    for name in "ab":
        (tmp_path / name / "final").mkdir(parents=True)
    one, other = (
        pipelines.composed(*given, f"model.id={tmp_path / name / 'final'}", f"data.file={tmp_path / name / 'text.txt'}")
        for name in "ab"
    )
    assert settings_of(one) != settings_of(other)
    assert config_of(one) == config_of(other) and str(tmp_path) not in json.dumps(config_of(one))
    assert str(tmp_path) not in json.dumps(without_places(one.choices))


def stage_hash(outcome: Outcome, stage: str) -> str:
    return outcome.record.stages[stage]["checkpoint_hash"]


def files(folder: Path) -> dict[str, int]:
    """Time of the last change of every stage's and evaluation's files."""
    names = ("cluster", "block_finetune", "evaluate")
    return {str(path): path.stat().st_mtime_ns for name in names for path in folder.glob(f"{name}-*/**/*")}


def test_records_name_no_place_of_this_machine(tuned, ground):
    """So that they can be published: of files of the settings the names are kept."""
    texts = [value for value in json.dumps(tuned.record.config).split('"') if value.startswith(("/", "~"))]
    assert not texts and str(ground) not in json.dumps(tuned.record.config)
    assert tuned.record.config["stages"]["cluster"]["data"]["file"] == "text.txt"


def test_the_record_has_the_schema_of_the_design(tuned, ground):
    record = read(tuned.path)
    assert record == tuned.record and record.schema == SCHEMA
    assert set(record.run) == {
        "name", "experiment", "key", "weights", "date", "seconds", "cpu_seconds", "commit", "commits", "dirty",
        "status",
    }  # fmt: skip
    assert record.run["status"] == "finished" and tuned.path.parent.name == f"run-{record.run['key']}"
    steps = ["evaluate original", "cluster", "evaluate cluster", "block_finetune", "evaluate block_finetune"]
    for seconds in (record.run["seconds"], record.run["cpu_seconds"]):
        assert list(seconds) == steps and min(seconds.values()) > 0
    assert record.config["seed"] == 0 and record.config["stages"]["cluster"]["method"]["codebook_size"] == 32
    assert "${" not in json.dumps(record.config)
    assert {"device", "versions", "peak_ram"} <= set(record.machine)
    assert set(record.machine["peak_ram"]) == set(steps)
    assert {"linear_bits_per_weight", "model_bits_per_weight", "checkpoint_bytes", "ledger"} <= set(record.size)


def test_scores_come_in_order_with_one_protocol(tuned):
    scores = [score for score in tuned.record.scores if score.metric == "perplexity"]
    assert [score.after for score in scores] == ["original", "cluster", "block_finetune"]
    assert len({score.protocol["hash"] for score in tuned.record.scores}) == 1
    assert all(score.n == 8 * 31 for score in scores)
    fields = scores[0].protocol
    assert fields["context"] == 32 and fields["windows"] == 8 and fields["partial"] is True
    rest = {key: value for key, value in fields.items() if key != "hash"}
    assert protocol(**rest) == fields


def test_the_size_is_that_of_the_files(tuned):
    """Bits by hand: 5 for a code of K = 32, a code for 4 weights, 32 x 4 half floats a matrix, 7 matrices a block."""
    size = tuned.record.size
    weights = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    bits = 5 * weights // 4 + 3 * 7 * 32 * 4 * 16
    assert size["linear_bits_per_weight"] == pytest.approx(bits / weights)
    stored = list(tuned.checkpoint.glob("*.safetensors"))
    assert size["checkpoint_bytes"] == sum(path.stat().st_size for path in stored)
    tensors = load_file(stored[0])
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) * 8 == sum(
        size["ledger"].values()
    )


def test_golden_numbers_of_the_tiny_pipeline(tuned):
    """Recorded on a CPU. To refresh: delete tests/golden/tiny.json, run this test twice, judge the difference."""
    scores = [score for score in tuned.record.scores if score.metric == "perplexity"]
    found = {f"perplexity after {score.after}": score.value for score in scores}
    found["relative error of cluster"] = tuned.record.stages["cluster"]["found"]["relative_error"]
    for number, block in enumerate(tuned.record.stages["block_finetune"]["found"]["blocks"]):
        found[f"loss of block {number} after"] = block["after"]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was missing and has been written; run again")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


def test_finished_parts_are_used_again(tuned, ground):
    before = files(ground / "outputs")
    again = pipeline(ground, ground / "outputs", *TUNED)
    assert files(ground / "outputs") == before and before
    assert again.record.scores == tuned.record.scores and again.record.stages == tuned.record.stages


def test_runs_share_the_stages_before_they_differ(tuned, ground):
    before = files(ground / "outputs")
    other = pipeline(ground, ground / "outputs", *TUNED, "block_finetune.epochs=1", "name=other")
    after = files(ground / "outputs")
    assert {path: after[path] for path in before} == before
    assert len(list((ground / "outputs").glob("cluster-*"))) == 1
    assert len(list((ground / "outputs").glob("block_finetune-*"))) == 2
    assert stage_hash(other, "cluster") == stage_hash(tuned, "cluster")
    assert stage_hash(other, "block_finetune") != stage_hash(tuned, "block_finetune")
    assert other.path != tuned.path and tuned.path.exists()


def test_another_text_makes_another_finetuning_even_under_the_same_name(tuned, ground, tmp_path):
    (tmp_path / "text.txt").write_text((ground / "text.txt").read_text()[::-1])
    other = pipeline(ground, ground / "outputs", *TUNED, f"data.file={tmp_path / 'text.txt'}")
    assert stage_hash(other, "cluster") == stage_hash(tuned, "cluster")
    assert stage_hash(other, "block_finetune") != stage_hash(tuned, "block_finetune")


def test_the_same_settings_elsewhere_give_the_same_bits_and_another_seed_others(tuned, ground, tmp_path):
    same = pipeline(ground, tmp_path / "same", *TUNED)
    assert {stage: stage_hash(same, stage) for stage in same.record.stages} == {
        stage: stage_hash(tuned, stage) for stage in tuned.record.stages
    }
    assert same.record.scores == tuned.record.scores and same.record.run["key"] == tuned.record.run["key"]
    other = pipeline(ground, tmp_path / "same", "seed=1")
    assert stage_hash(other, "cluster") != stage_hash(tuned, "cluster")


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_an_altered_checkpoint_is_found_told_and_made_again(tuned, ground, tmp_path, caplog):
    shutil.copytree(ground / "outputs", tmp_path / "moved")
    (checkpoint,) = tmp_path.glob("moved/cluster-*/checkpoint")
    flip(checkpoint / "model.safetensors")
    again = pipeline(ground, tmp_path / "moved", *TUNED)
    assert "altered" in caplog.text and "model.safetensors" in caplog.text
    assert stage_hash(again, "cluster") == stage_hash(tuned, "cluster")
    assert again.record.scores == tuned.record.scores


def test_a_moved_outputs_folder_stays_valid(tuned, ground, tmp_path):
    shutil.copytree(ground / "outputs", tmp_path / "moved")
    before = files(tmp_path / "moved")
    moved = pipeline(ground, tmp_path / "moved", *TUNED)
    assert files(tmp_path / "moved") == before
    assert moved.checkpoint.is_relative_to(tmp_path / "moved")


@pytest.mark.parametrize("damage", [lambda _: "", lambda text: text[:-9], lambda text: text.replace("7", "8", 1)])
def test_damaged_metrics_are_made_again(tuned, ground, tmp_path, damage, caplog):
    shutil.copytree(ground / "outputs", tmp_path / "moved")
    for path in tmp_path.glob("moved/*/metrics.json"):
        path.write_text(damage(path.read_text()))
    again = pipeline(ground, tmp_path / "moved")
    assert "metrics.json is damaged" in caplog.text
    assert stage_hash(again, "cluster") == stage_hash(tuned, "cluster")
    assert again.record.scores == [row for row in tuned.record.scores if row.after != "block_finetune"]


def test_two_stages_whose_folders_were_exchanged_are_told_and_made_again(tuned, ground, tmp_path, caplog):
    """Each part of them is whole, but belongs to the other one: the folder, the metrics or the checkpoint alone."""
    other = pipeline(ground, tmp_path / "other", "method.iterations=1")
    assert stage_hash(other, "cluster") != stage_hash(tuned, "cluster")
    (theirs,) = (tmp_path / "other").glob("cluster-*")
    for part in ("", "metrics.json", "checkpoint"):
        outputs = tmp_path / f"moved-{part}"
        shutil.copytree(ground / "outputs", outputs)
        (ours,) = (path for path in outputs.glob("cluster-*") if path.name == f"cluster-{key_of(tuned, ground)}")
        shutil.rmtree(ours / part) if part != "metrics.json" else (ours / part).unlink()
        (shutil.copyfile if part == "metrics.json" else shutil.copytree)(theirs / part, ours / part)
        caplog.clear()
        again = pipeline(ground, outputs)
        assert caplog.text.count("belongs to another folder") == 1
        assert stage_hash(again, "cluster") == stage_hash(tuned, "cluster")


def key_of(outcome: Outcome, ground: Path) -> str:
    """The key of the run's stage cluster, from the folder that holds its checkpoint."""
    hashes = {
        path.parent.name: json.loads(path.read_text()) for path in (ground / "outputs").glob("cluster-*/metrics.json")
    }
    (name,) = (name for name, found in hashes.items() if found["checkpoint_hash"] == stage_hash(outcome, "cluster"))
    return name.removeprefix("cluster-")


def test_scores_that_belong_to_another_model_are_measured_again(tuned, ground, tmp_path, caplog):
    shutil.copytree(ground / "outputs", tmp_path / "moved")
    first, second, *_ = sorted((tmp_path / "moved").glob("evaluate-*"))
    for one, two in ((first, "aside"), (second, first.name), (tmp_path / "moved" / "aside", second.name)):
        one.rename(one.with_name(two))
    again = pipeline(ground, tmp_path / "moved", *TUNED)
    assert "belongs to another folder" in caplog.text and again.record.scores == tuned.record.scores


def test_what_another_commit_finished_says_so_once(ground, tmp_path, caplog):
    caplog.set_level(logging.INFO, "cluscomp")
    pipeline(ground, tmp_path / "out")
    for path in tmp_path.glob("out/*/metrics.json"):
        write_sealed(path, dict(read_sealed(path) or {}) | {"commit": "f" * 40, "dirty": False})
    (record,) = tmp_path.glob("out/run-*/record.json")
    values = json.loads(record.read_text())
    values["run"] |= {"commit": None, "dirty": None}
    record.write_text(json.dumps(values))
    assert "finished before, by" not in caplog.text
    pipeline(ground, tmp_path / "out")
    told = [line for line in caplog.messages if "finished before, by" in line]
    assert [line.split("  ")[0] for line in told][:3] == ["evaluate original", "cluster", "evaluate cluster"]
    assert len(told) == 4 and all("by commit ffffffffffff; this is " in line for line in told[:3])
    assert told[3].startswith("run-") and "by code of no commit; this is " in told[3]


def test_a_fresh_run_makes_everything_anew_and_replaces_only_by_what_is_whole(ground, tmp_path, monkeypatch):
    first = pipeline(ground, tmp_path / "out", "evaluate.distance=true")
    before = files(tmp_path / "out")

    def fails(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("cluscomp.checkpoint.save", fails)
        pipeline(ground, tmp_path / "out", "evaluate.distance=true", "fresh=true")
    kept = files(tmp_path / "out")
    stage = {path for path in before if "cluster-" in path}
    assert {path: kept[path] for path in stage} == {path: before[path] for path in stage}

    again = pipeline(ground, tmp_path / "out", "evaluate.distance=true", "fresh=true")
    after = files(tmp_path / "out")
    assert after.keys() == before.keys()
    assert not [
        path for path in before if path.endswith(("metrics.json", "safetensors")) and after[path] == before[path]
    ]
    assert again.path == first.path and again.record.run["date"] >= first.record.run["date"]
    assert again.record.scores == first.record.scores
    assert again.record.stages["cluster"]["checkpoint_hash"] == stage_hash(first, "cluster")
    assert again.record.config == first.record.config


def swap(outputs: Path, other: Path) -> None:
    """Let the finished cluster stage be another one, as if its method's code had changed and it had been made again."""
    (folder,), (source,) = outputs.glob("cluster-*"), other.glob("cluster-*")
    shutil.rmtree(folder / "checkpoint")
    shutil.copytree(source / "checkpoint", folder / "checkpoint")
    key = folder.name.rpartition("-")[2]
    write_sealed(folder / "metrics.json", read_sealed(source / "metrics.json") | {"key": key})


def test_what_was_made_of_a_checkpoint_that_is_another_one_now_is_made_anew(ground, tmp_path, caplog):
    first = pipeline(ground, tmp_path / "out", *TUNED)
    other = pipeline(ground, tmp_path / "other", *TUNED, "method.iterations=1")
    swap(tmp_path / "out", tmp_path / "other")
    again = pipeline(ground, tmp_path / "out", *TUNED)
    assert "of a checkpoint that was made anew since" in caplog.text
    assert again.record.scores == other.record.scores != first.record.scores
    assert stage_hash(again, "block_finetune") == stage_hash(other, "block_finetune")


def test_parts_that_were_made_of_another_checkpoint_are_not_gone_on_from(ground, tmp_path, monkeypatch):
    other = pipeline(ground, tmp_path / "other", *TUNED, "method.iterations=1")
    pipeline(ground, tmp_path / "out")

    def fails(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("cluscomp.checkpoint.save", fails)
        pipeline(ground, tmp_path / "out", *TUNED)
    assert list(tmp_path.glob("out/block_finetune-*/block-*"))
    swap(tmp_path / "out", tmp_path / "other")
    again = pipeline(ground, tmp_path / "out", *TUNED)
    assert stage_hash(again, "block_finetune") == stage_hash(other, "block_finetune")


def begin(ground: Path, outputs: Path, monkeypatch, code: tuple[str, bool], *more: str) -> dict[Path, int]:
    """A run of other code, killed before its first stage is whole; the parts, by their time."""

    def fails(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("cluscomp.checkpoint.save", fails)
        patch.setattr("cluscomp.runs.begun.commit", lambda: code)
        pipeline(ground, outputs, *more)
    return {path: path.stat().st_mtime_ns for path in outputs.glob("cluster-*/**/block-*")}


def watched(outputs: Path, monkeypatch) -> list[bool]:
    """Whether there are parts when the stage begins or goes on to work."""
    found: list[bool] = []

    def run(*job, run=clustering.run):
        found.append(any(outputs.glob("cluster-*/**/block-*")))
        return run(*job)

    monkeypatch.setattr(clustering, "run", run)
    return found


def test_parts_of_code_in_no_commit_are_told_to_the_end(ground, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "cluscomp")
    assert begin(ground, tmp_path / "out", monkeypatch, ("a" * 40, True))
    assert begin(ground, tmp_path / "out", monkeypatch, ("b" * 40, False))  # a second clean one knows of the first
    told = [line for line in caplog.messages if "begun by" in line]
    assert told == ["cluster  begun by commit aaaaaaaaaaaa with changes; this is commit bbbbbbbbbbbb"]
    monkeypatch.setattr("cluscomp.runs.begun.commit", lambda: ("b" * 40, False))
    monkeypatch.setattr("cluscomp.runs.run.commit", lambda: ("b" * 40, False))
    went_on = watched(tmp_path / "out", monkeypatch)
    made = pipeline(ground, tmp_path / "out")
    assert went_on == [True] and made.record.run["dirty"] is True
    (metrics,) = tmp_path.glob("out/cluster-*/metrics.json")
    assert read_sealed(metrics)["commit"] == "b" * 40 and read_sealed(metrics)["dirty"] is True
    assert not pipeline(ground, tmp_path / "clean").record.run["dirty"]


@pytest.mark.parametrize(
    ("first", "second", "goes_on"),
    [(("a" * 40, False), ("b" * 40, False), False), (("a" * 40, True), ("a" * 40, True), False),
     (("a" * 40, False), ("a" * 40, False), True)],
)  # fmt: skip
def test_a_fresh_run_goes_on_from_parts_of_the_same_clean_code_alone(
    ground, tmp_path, monkeypatch, first, second, goes_on
):
    assert begin(ground, tmp_path / "out", monkeypatch, first, "fresh=true")
    monkeypatch.setattr("cluscomp.runs.begun.commit", lambda: second)
    went_on = watched(tmp_path / "out", monkeypatch)
    pipeline(ground, tmp_path / "out", "fresh=true")
    assert went_on == [goes_on]


def test_a_domain_told_later_marks_scores_that_were_there(ground, tmp_path):
    rows = [json.dumps({"text": "a fox and a hare " * n}) for n in range(90)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    more = ["method.assign=hessian", "data@scored=hub", f"scored.id={tmp_path / 'rows.jsonl'}", "scored.separator=' '"]
    first = pipeline(ground, tmp_path / "out", *more)
    again = pipeline(ground, tmp_path / "out", *more, f"scored.domain='{ground / 'text.txt'}'")
    marks = [[one.seen["cluster"]["in_domain"] for one in run.record.scores if one.seen] for run in (first, again)]
    assert not any(marks[0]) and all(marks[1]) and len(marks[0]) == len(marks[1]) > 0
    assert [one.value for one in first.record.scores] == [one.value for one in again.record.scores]
    assert read(again.path).scores == again.record.scores


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits_and_damaged_parts_are_made_again(ground, forks, tmp_path, caplog):
    """Killed after the first block of cluster, then of block_finetune; the rest from whole and from altered parts."""
    long = [
        *TUNED,
        "model.config.num_hidden_layers=2",
        "method.iterations=50",
        "block_finetune.epochs=6",
        "evaluate.after=[block_finetune]",
    ]
    whole = pipeline(ground, tmp_path / "whole", *long)
    killed = tmp_path / "killed"

    command = overrides(ground, killed, *long)
    forks.kill_at(killed, "cluster-*/block-000.safetensors", *command)
    assert not list(killed.glob("cluster-*/metrics.json")), "too late: the stage had ended"
    shutil.copytree(killed, tmp_path / "altered")
    (part,) = tmp_path.glob("altered/cluster-*/block-000.safetensors")
    flip(part)

    forks.kill_at(killed, "block_finetune-*/streams.json", *command)
    assert not list(killed.glob("block_finetune-*/metrics.json")), "too late: the stage had ended"
    for name in ("streams.json", "student", "block-000"):
        shutil.copytree(killed, tmp_path / name)
        (part,) = tmp_path.glob(f"{name}/block_finetune-*/{name}*")
        flip(part, 40)

    caplog.set_level(logging.INFO, "cluscomp")
    resumed = pipeline(ground, killed, *long)
    assert "of 2 blocks were done before" in caplog.text
    hashes = {stage: stage_hash(whole, stage) for stage in ("cluster", "block_finetune")}
    assert {stage: stage_hash(resumed, stage) for stage in hashes} == hashes
    assert resumed.record.scores == whole.record.scores
    assert resumed.record.stages["block_finetune"]["found"] == whole.record.stages["block_finetune"]["found"]
    left = {path.name for stage in hashes for path in killed.glob(f"{stage}-*/*")}
    assert left == {"checkpoint", "metrics.json"}  # the parts are gone
    unnoticed = []
    for name in ("altered", "streams.json", "student", "block-000"):
        again = pipeline(ground, tmp_path / name, *long)
        if {stage: stage_hash(again, stage) for stage in hashes} != hashes:
            unnoticed.append(name)
    assert not unnoticed


def block_outputs(folder: Path, ids_WT: torch.Tensor) -> list[torch.Tensor]:
    """What each block of a model hands on, by plain transformers and forward hooks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _module, _args, output: found.append(output))
    with torch.no_grad():
        model(ids_WT)
    return [output[0] if isinstance(output, tuple) else output for output in found]


def test_block_finetune_lowers_the_loss_of_the_stored_model(tuned, ground):
    """Against the original's own stream, of the models as they lie on the disk."""
    found = tuned.record.stages["block_finetune"]["found"]
    assert all(block["after"] < block["before"] and not block["kept"] for block in found["blocks"])
    (clustered,) = (ground / "outputs").glob("cluster-*/checkpoint")
    stage = pipelines.composed(*overrides(ground, ground / "outputs", *TUNED)).stages
    text = stage["block_finetune"].data.text("calibration")
    windows = calibration_windows(text, AutoTokenizer.from_pretrained(original(ground)), samples=8, length=32, seed=0)
    target, before, after = (
        block_outputs(folder, torch.from_numpy(windows)) for folder in (original(ground), clustered, tuned.checkpoint)
    )
    losses = [block["after"] for block in found["blocks"]]
    assert losses == pytest.approx([float((a - b).square().mean()) for a, b in zip(after, target)], rel=1e-4)
    first = float((before[0] - target[0]).square().mean())
    assert found["blocks"][0]["before"] == pytest.approx(first, rel=1e-4)
    assert found["tokens"] == 8 * 32
    for block in found["blocks"]:
        assert len(block["epochs"]) == 4 and all(epoch["gradient"] > 0 for epoch in block["epochs"])
        first, last = (block["epochs"][number]["loss"] for number in (0, -1))
        assert block["after"] < last < first < 1.01 * block["before"]  # each epoch's mean, while it learns


def test_block_finetune_changes_the_codebooks_alone(tuned, ground):
    (clustered,) = (ground / "outputs").glob("cluster-*/checkpoint")
    before, after = (load_file(folder / "model.safetensors") for folder in (clustered, tuned.checkpoint))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.endswith(".codebooks")}


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_learning_rate_that_ends_in_nan_keeps_the_codebooks(tuned, ground, epochs, caplog):
    """With one epoch over one batch no later loss is seen that is not finite: the outcome alone must show it."""
    steep = [f"block_finetune.epochs={epochs}", "block_finetune.batch_size=8", "block_finetune.lr=1e30"]
    outcome = pipeline(ground, ground / "outputs", *TUNED, *steep)
    blocks = outcome.record.stages["block_finetune"]["found"]["blocks"]
    assert all(block["kept"] and block["after"] == block["before"] for block in blocks) and len(blocks) == 3
    assert stage_hash(outcome, "block_finetune") == stage_hash(outcome, "cluster")
    assert "keeps the codebooks" in caplog.text
    values = {(row.after, row.metric): row.value for row in outcome.record.scores}
    assert values["block_finetune", "perplexity"] == values["cluster", "perplexity"]


def test_a_model_that_overflows_is_finished_and_the_record_tells(tuned, ground, tmp_path):
    """A norm's weight of 1e30 in the second block: from there on the original's hidden states are not finite."""
    model = tmp_path / "model"
    shutil.copytree(original(ground), model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"][3] = 1e30
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    command = [*TUNED, "model=hub", f"model.id={model}", "evaluate.after=[]"]
    found = pipeline(ground, tmp_path / "outputs", *command).record.stages["block_finetune"]["found"]
    assert found["kept"] == 2 and [block["kept"] for block in found["blocks"]] == [False, True, True]
    assert all("before" in block["reasons"][0] and block["attempts"] == 0 for block in found["blocks"][1:])
    (clustered,), (finetuned,) = ((tmp_path / "outputs").glob(f"{name}-*/checkpoint") for name in tuned.record.stages)
    before, after = (load_file(folder / "model.safetensors") for folder in (clustered, finetuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.layers.0.") for name in changed)


def test_same_input_is_another_target(tuned, ground):
    outcome = pipeline(ground, ground / "outputs", *TUNED, "block_finetune.target=same_input")
    blocks = outcome.record.stages["block_finetune"]["found"]["blocks"]
    paper = tuned.record.stages["block_finetune"]["found"]["blocks"]
    assert blocks[0] == paper[0]  # both streams enter the first block alike
    assert blocks[1]["before"] < paper[1]["before"]  # no error was handed on


def test_publish_copies_the_record_under_name_and_key(ground, tmp_path):
    outcome = pipeline(ground, ground / "outputs", f"publish={tmp_path / 'results'}", "name=trial")
    published = tmp_path / "results" / "trial" / f"{outcome.record.run['key']}.json"
    assert list(published.parent.iterdir()) == [published]
    assert published.read_bytes() == outcome.path.read_bytes()


def test_a_model_that_is_fetched_first_is_planned_then(ground, tmp_path, monkeypatch, caplog):
    """Of the hub nothing but the download itself is left out: its cache holds nothing of the model before."""
    caplog.set_level(logging.INFO, "cluscomp")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(original(ground)))
    fetched = ["model=hub", "model.id=org/not-here-yet", "evaluate.after=[cluster]"]
    made = pipeline(ground, tmp_path / "out", *fetched)
    planned, size = made.record.machine["predicted"], made.record.size
    assert planned["checkpoint_bytes"] == pytest.approx(size["checkpoint_bytes"], rel=0.02)
    assert "no plan yet: model.id=org/not-here-yet" in caplog.text and "bits per weight of the linears" in caplog.text
    with pytest.raises(InputError, match=r"evaluate cluster would need .* GiB of RAM"):
        pipeline(ground, tmp_path / "large", *fetched, "evaluate.batch_size=100000000")
    with pytest.raises(InputError, match="learns=clipping needs a method on uniform grids"):
        pipeline(ground, tmp_path / "late", *fetched, *TUNED, "block_finetune.learns=clipping")
    assert not list(tmp_path.glob("large/*")) and not list(tmp_path.glob("late/*"))


def test_models_continue_the_prompt(ground):
    outcome = pipeline(ground, ground / "outputs", "evaluate.prompt=The", "evaluate.prompt_tokens=4")
    assert set(outcome.samples) == {"original", "cluster"}
    assert all(sample.startswith("The") and len(sample) > 3 for sample in outcome.samples.values())


def test_what_is_not_asked_for_is_not_measured(ground):
    outcome = pipeline(ground, ground / "outputs", "evaluate.after=[cluster]")
    assert {score.after for score in outcome.record.scores} == {"cluster"}


def test_the_device_and_the_dtype_are_part_of_the_key(tuned, ground):
    outcome = pipeline(ground, ground / "outputs", "dtype=bfloat16")
    assert outcome.record.scores[0].protocol["dtype"] == "bfloat16"
    assert outcome.record.scores[0].protocol["hash"] != tuned.record.scores[0].protocol["hash"]
    assert outcome.record.scores[0].value != tuned.record.scores[0].value
