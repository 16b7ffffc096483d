"""One run: fold the stages over the model, resume what is finished, write the record.

A stage's folder is named by its content: a hash of the key before it, its settings, the model, the texts, the seed and
the format version. It is finished when `metrics.json` is there, which is written last. So runs that share a beginning
share its result, changed settings never re-use old state, and two configs never overwrite each other. A process that
comes to a folder where another one works waits, and re-uses what that one leaves. Of the processes of one run
(torchrun) the first does and writes everything; the others train with it where a stage is `distributed`.
"""

import json
import logging
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, InstanceOf, field_validator, model_validator
from pydantic.dataclasses import dataclass

from cluscomp import __version__
from cluscomp.contamination import WORDS
from cluscomp.costs import Machine
from cluscomp.errors import InputError
from cluscomp.files import held_alone
from cluscomp.records import SCHEMA, Record, Score, content_key, read_sealed, write, write_sealed
from cluscomp.steps import rank
from cluscomp.tasks import flipped, read_answers, write_answers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from cluscomp.contamination import Seen
    from cluscomp.models import Original
    from cluscomp.plan import Plan

log = logging.getLogger("cluscomp")
PLACES = ("outputs", "cache", "publish", "data_root")  # settings that say where things lie, not what is done
LOG = "log.txt"  # what the terminal showed, in the run's folder
ANSWERS = "answers.jsonl.gz"  # to the tasks, of one model
POLL = 0.2  # seconds between two looks for what the first process writes


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Experiment:
    """The settings of a run. `order` names the stages to run, each one of `stages`; `evaluate` measures after them.

    "evaluate" may stand last in `order`, to say so; [evaluate] alone scores the model as it is.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    model: Any
    stages: dict[str, Any]
    order: list[str]
    evaluate: Any
    tracker: Any
    machine: InstanceOf[Machine]
    seed: int = Field(ge=0)
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    outputs: str
    cache: str
    publish: str | None
    force: bool

    @field_validator("order", mode="after")
    @classmethod
    def _stages_alone(cls, order: list[str]) -> list[str]:
        if not order:
            raise ValueError("no stage is named; order=[evaluate] scores the model as it is")
        return order[:-1] if order[-1] == "evaluate" else order

    @model_validator(mode="after")
    def _stages_fit(self) -> "Experiment":
        for number, name in enumerate(self.order):
            if name not in self.stages:
                raise ValueError(f"order: there is no stage '{name}'; stages: {', '.join(sorted(self.stages))}")
            if name in self.order[:number]:
                raise ValueError(f"order: stage '{name}' is named twice")
            takes = self.stages[name].takes
            if takes != ("compressed" if number else "original"):
                why = "cannot come first: it takes a compressed model" if takes == "compressed" else "must come first"
                raise ValueError(f"order: stage '{name}' {why}")
        unknown = [name for name in self.measured if name != "original" and name not in self.order]
        if unknown:
            raise ValueError(f"evaluate.after: '{unknown[0]}' is not 'original' or a stage in order {self.order}")
        return self

    @property
    def measured(self) -> list[str]:
        """After what the model is scored: "original" and names of stages, in the order of the run."""
        places = ["original", *self.order]
        return places if self.evaluate.after is None else self.evaluate.after


@dataclass(frozen=True)
class Outcome:
    """What a run left: its record, where that is, its last checkpoint if any, and the models' samples."""

    record: Record
    path: Path
    checkpoint: Path | None
    samples: dict[str, str]


def run(experiment: Experiment) -> Outcome:
    """Run the stages in order and evaluate; finished parts are re-used. Raises InputError for what cannot work."""
    config = settings(experiment)
    outputs, cache = writable("outputs", experiment.outputs), writable("cache", experiment.cache)
    first = rank() == 0
    publish = None if experiment.publish is None or not first else writable("publish", experiment.publish)
    if not experiment.machine.here:
        raise InputError(f"machine={experiment.machine.name}: only `cluscomp plan` works for another machine")
    predicted = foreseen(experiment, cache) if first else None
    with held_alone(cache, "model"):
        folder = experiment.model.folder(cache)

    from cluscomp.models import fingerprint
    from cluscomp.quantised import opened
    from cluscomp.tracking import NoTracker

    device, dtype = _device(experiment.device), _dtype(experiment)
    original = opened(folder, dtype, device, to_score=not experiment.order)
    root = {"model": fingerprint(folder), "dtype": str(dtype), "device": device.type, "format": _format()}
    runner = (_Runner if first else _Follower)(experiment, outputs, original)
    tracker = experiment.tracker if first else NoTracker()
    keys = stage_keys(experiment, root)
    runner.check(keys)
    runner.kept = outputs / f"predictions-{content_key([keys['original'], _versions()])}"
    run_key = content_key([keys, runner.evaluation, experiment.measured, experiment.name])
    run_folder = outputs / f"run-{run_key}"
    if first:
        _log_into(run_folder)
    tracker.begin(f"{experiment.name}-{run_key}", config, run_folder)
    metrics: dict[str, dict[str, Any]] = {}
    checkpoint = None
    for name in ["original", *experiment.order]:
        if name != "original":
            metrics[name] = runner.stage(name, keys[name], checkpoint)
            checkpoint = runner.folder(name, keys[name]) / "checkpoint"
            tracker.log(name, _numbers(metrics[name]))
        if name in experiment.measured:
            label = f"evaluate {name}"
            metrics[label] = runner.evaluate(name, keys[name], checkpoint)
            tracker.log(label, {f"{row['dataset']}/{row['metric']}": row["value"] for row in metrics[label]["scores"]})
    answers = {name: runner.answers(keys[name]) for name in experiment.measured if runner.answers(keys[name]).is_file()}
    record = _record(experiment, config, run_key, metrics, original, answers, predicted)
    path = run_folder / "record.json"
    if first:
        for name, place in answers.items():
            shutil.copy(place, run_folder / f"answers-{name}.jsonl.gz")
        write(record, path)
    if publish is not None:
        write(record, publish / experiment.name / f"{run_key}.json")
    tracker.end({f"{row.after}/{row.dataset}/{row.metric}": row.value for row in record.scores} | record.size)
    samples = {
        name: metrics[f"evaluate {name}"]["sample"]
        for name in experiment.measured
        if metrics[f"evaluate {name}"]["sample"] is not None
    }
    return Outcome(record, path, checkpoint, samples)


def foreseen(experiment: Experiment, cache: Path) -> "Plan | None":
    """The plan of a run on this machine, in the log; None, with a line, for a model of which too little is known.

    Raises InputError if a stage does not fit, unless `force`.
    """
    from cluscomp.checkpoint import NAME
    from cluscomp.models import quantizer
    from cluscomp.plan import plan

    device = _device(experiment.device)
    try:
        config = experiment.model.outline(cache)
    except InputError as error:
        log.info("no plan: %s", error)
        return None
    if not experiment.order and quantizer(config) not in (None, NAME):
        log.info("no plan: what layers of '%s' take is not known", quantizer(config))
        return None
    found = plan(experiment, config, _dtype(experiment), device.type)
    log.info("%s", found.table())
    if not experiment.force:
        found.refuse()
    return found


def planned(experiment: Experiment) -> "Plan":
    """The plan of a run for its machine; reads nothing but the model's config. Raises InputError without one."""
    import torch

    from cluscomp.plan import plan

    if experiment.machine.here:
        device, dtype = _device(experiment.device).type, _dtype(experiment)
    else:
        device = "cuda" if experiment.device == "auto" else experiment.device
        dtype = torch.bfloat16 if experiment.dtype == "auto" else getattr(torch, experiment.dtype)
    config = experiment.model.outline(Path(experiment.cache).expanduser())
    return plan(experiment, config, dtype, device)


def stage_keys(experiment: Experiment, root: dict[str, Any]) -> dict[str, str]:
    """The key of the original, whose identity is `root`, and of each stage: a hash of all that decides its result."""
    keys = {"original": content_key(root)}
    for before, name in zip(["original", *experiment.order], experiment.order):
        stage = experiment.stages[name]
        keys[name] = content_key([keys[before], name, experiment.seed, _key_settings(stage), stage.inputs()])
    return keys


def writable(key: str, value: str) -> Path:
    """A folder that a setting names, made if need be. Raises InputError if it cannot be written."""
    folder = Path(value).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{key}={value}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{key}={value}: cannot be written")
    return folder


def _log_into(folder: Path) -> None:
    """Send the project's log lines into `folder`/log.txt, too, and no longer into that of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [handler for handler in log.handlers if handler.name == LOG]:
        log.removeHandler(old)
    handler = logging.FileHandler(folder / LOG)
    handler.set_name(LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)


class _Runner:
    """Runs one stage or evaluation in its folder, unless that is finished."""

    def __init__(self, experiment: Experiment, outputs: Path, original: "Original") -> None:
        self.experiment, self.outputs, self.original = experiment, outputs, original
        evaluate = experiment.evaluate
        self.evaluation = [_key_settings(evaluate), evaluate.inputs(), original.device.type, _versions(), WORDS]
        self.kept = outputs  # the folder for what the original predicts, once its key is known

    def folder(self, name: str, key: str) -> Path:
        return self.outputs / f"{name}-{key}"

    def check(self, keys: dict[str, str]) -> None:
        """Ask every stage that is not finished whether it can work. Raises InputError before any long work."""
        for name in self.experiment.order:
            if self._finished(self.folder(name, keys[name])) is None:
                self.experiment.stages[name].check(self.original)
        self.experiment.evaluate.check(self.original)

    def stage(self, name: str, key: str, before: Path | None) -> dict[str, Any]:
        """The metrics of a stage, which leaves its model in `checkpoint` of its folder."""
        folder = self.folder(name, key)
        with held_alone(folder, name):
            metrics = self._stage(name, folder, before)
            _keep_alone(folder, "checkpoint", "metrics.json", "lock")
        return metrics

    def _stage(self, name: str, folder: Path, before: Path | None) -> dict[str, Any]:
        from cluscomp import budget, checkpoint
        from cluscomp.stages import Job

        finished = self._finished(folder)
        if finished is not None:
            try:
                checkpoint.verify(folder / "checkpoint")
            except InputError as error:
                log.warning("%s; the stage is run again", error)
            else:
                log.info("%s  finished before, %s", name, folder)
                return finished
        with _measured() as cost:
            model = self._load(before)
            job = Job(folder, self.experiment.seed, self.original)
            found = self.experiment.stages[name].run(model, job)
            checkpoint.save(model, self.original.tokenizer, folder / "checkpoint")
        counted = budget.size_of(model)
        budget.check_file(counted, checkpoint.tensor_bytes(folder / "checkpoint"))
        size = asdict(counted) | {"checkpoint_bytes": checkpoint.weight_bytes(folder / "checkpoint")}
        hash_ = checkpoint.checkpoint_hash(folder / "checkpoint")
        metrics = cost | {"found": found, "size": size, "checkpoint_hash": hash_}
        write_sealed(folder / "metrics.json", metrics)
        return metrics

    def evaluate(self, name: str, key: str, checkpoint: Path | None) -> dict[str, Any]:
        """Scores of the model after stage `name`, and its continuation of the prompt."""
        folder = self.folder("evaluate", content_key([key, *self.evaluation]))
        with held_alone(folder, f"evaluate {name}"):
            metrics = self._evaluate(name, folder, checkpoint)
            _keep_alone(folder, "metrics.json", ANSWERS, "lock")
        return metrics

    def answers(self, key: str) -> Path:
        """Where the answers of the model with this key to the tasks are, if there were tasks."""
        return self.folder("evaluate", content_key([key, *self.evaluation])) / ANSWERS

    def _evaluate(self, name: str, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
        evaluate = self.experiment.evaluate
        finished = self._finished(folder)
        if finished is not None:
            # The same model may have been reached under another name.
            return finished | {"scores": [row | {"after": name} for row in finished["scores"]]}
        with _measured() as cost:
            seen = evaluate.contamination(self.original, self._seen(name))
            model = self._load(checkpoint)
            scores = [asdict(score) for score in evaluate.measure(model, self.original, name, self.kept)]
            asked, answers = evaluate.ask(model, self.original, name)
            scores += [asdict(score) for score in asked]
            sample = evaluate.sample(model, self.original, name)
        scores = [row | {"seen": seen.get(row["dataset"], {})} for row in scores]
        if answers:
            write_answers(folder / ANSWERS, answers)
        metrics = cost | {"scores": scores, "sample": sample}
        for row in scores:
            log.info("evaluate  %s after %s: %.3f on %s", row["metric"], name, row["value"], row["dataset"])
        write_sealed(folder / "metrics.json", metrics)
        return metrics

    def _seen(self, name: str) -> "dict[str, Seen]":
        """What the stages up to `name` learned from, of those that learned from text."""
        order = ["original", *self.experiment.order]
        found = {
            stage: self.experiment.stages[stage].seen(self.original, self.experiment.seed)
            for stage in order[1 : order.index(name) + 1]
        }
        return {stage: seen for stage, seen in found.items() if seen is not None}

    def _load(self, folder: Path | None) -> "PreTrainedModel":
        from cluscomp import checkpoint

        if folder is None:
            return self.original.model()
        return checkpoint.load(folder, self.original.dtype, self.original.device)

    def _finished(self, folder: Path) -> dict[str, Any] | None:
        return read_sealed(folder / "metrics.json")


class _Follower(_Runner):
    """What the other processes of a run do: train with the first where a stage is `distributed`, else wait for it."""

    def stage(self, name: str, key: str, before: Path | None) -> dict[str, Any]:
        """The metrics of a stage once the first process has written them."""
        from cluscomp.stages import Job

        folder, stage = self.folder(name, key), self.experiment.stages[name]
        if stage.distributed and not self._whole(folder):
            stage.run(self._load(before), Job(folder, self.experiment.seed, self.original))
        while not self._whole(folder):
            time.sleep(POLL)
        return dict(read_sealed(folder / "metrics.json") or {})

    def evaluate(self, name: str, key: str, checkpoint: Path | None) -> dict[str, Any]:  # noqa: ARG002
        """The scores once the first process has written them."""
        folder = self.folder("evaluate", content_key([key, *self.evaluation]))
        while (finished := read_sealed(folder / "metrics.json")) is None:
            time.sleep(POLL)
        return finished

    def _whole(self, folder: Path) -> bool:
        """Whether a stage is finished and its checkpoint as it was written."""
        from cluscomp import checkpoint

        try:
            return read_sealed(folder / "metrics.json") is not None and bool(checkpoint.verify(folder / "checkpoint"))
        except InputError:
            return False


class _measured:
    """Seconds, CPU seconds and peak memory (bytes) of a `with` block, as a dictionary that fills at its end."""

    def __enter__(self) -> dict[str, Any]:
        from cluscomp.tracking import reset_peak_memory

        reset_peak_memory()
        self.start, self.cpu_start, self.cost = time.monotonic(), time.process_time(), dict[str, Any]()
        return self.cost

    def __exit__(self, *_: object) -> None:
        import torch

        from cluscomp.tracking import peak_memory

        self.cost |= {
            "seconds": time.monotonic() - self.start,
            "cpu_seconds": time.process_time() - self.cpu_start,
            "peak_ram": peak_memory(),
        }
        if torch.cuda.is_available():
            self.cost["peak_vram"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def settings(experiment: Experiment) -> dict[str, Any]:
    """The resolved settings as plain values, as they stand in the record: all but where things lie on this machine.

    Of a whole path its last part is kept.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in PLACES}
        return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value

    return dict(plain(json.loads(json.dumps(asdict(experiment), default=str))))


def _key_settings(stage: Any) -> dict[str, Any]:
    """What of a stage's settings decides its result: a text counts by its hash (`inputs()`), not by where it lies."""
    values = {key: value for key, value in asdict(stage).items() if key not in stage.idle()}
    return values | {part: values[part]["name"] for part in ("data", "instructions") if part in values}


def _keep_alone(folder: Path, *names: str) -> None:
    """Remove all else from a folder: what let a killed stage go on, and what killed processes left half-written."""
    for path in folder.iterdir():
        if path.name not in names:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The plain numbers of a stage's metrics, for the tracker."""
    flat = {"seconds": metrics["seconds"], "peak_ram": metrics["peak_ram"]} | metrics["found"] | metrics["size"]
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def _record(
    experiment: Experiment,
    config: dict[str, Any],
    key: str,
    metrics: dict[str, dict[str, Any]],
    original: "Original",
    answers: dict[str, Path],
    predicted: "Plan | None",
) -> Record:
    from cluscomp.kernels.loading import native

    scores = [Score(**row) for found in metrics.values() for row in found.get("scores", [])]
    scores += _flips(scores, answers)
    commit, dirty = _commit()
    return Record(
        schema=SCHEMA,
        run={
            "name": f"{experiment.name}-{key}",
            "experiment": experiment.name,
            "key": key,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {name: found["seconds"] for name, found in metrics.items()},
            "cpu_seconds": {name: found["cpu_seconds"] for name, found in metrics.items() if "cpu_seconds" in found},
            "commit": commit,
            "dirty": dirty,
            "status": "finished",
        },
        config=config,
        scores=scores,
        size=(metrics[experiment.order[-1]]["size"] if experiment.order else {}) | {"original": original.size()},
        machine={
            "device": str(original.device),
            "platform": platform.platform(),
            "kernels": "torch" if native is None else "compiled",
            "versions": _versions(),
            "peak_ram": {name: found["peak_ram"] for name, found in metrics.items()},
            "peak_vram": {name: found["peak_vram"] for name, found in metrics.items() if "peak_vram" in found},
            "predicted": None if predicted is None else predicted.predicted(),
        },
        stages={
            name: {key: metrics[name][key] for key in ("found", "size", "checkpoint_hash")} for name in experiment.order
        },
    )


def _flips(scores: list[Score], answers: dict[str, Path]) -> list[Score]:
    """For each model but the original the share of answers that went from right to wrong or back, task by task."""
    if "original" not in answers:
        return []
    original = read_answers(answers["original"])
    protocols = {score.dataset: score.protocol for score in scores if score.after == "original"}
    return [
        Score(
            after=name, metric="flipped", dataset=task, value=flips / count,
            stderr=(flips * (count - flips) / count**3) ** 0.5, n=count, protocol=protocols[task],
        )
        for name, place in answers.items() if name != "original"
        for task, (flips, count) in flipped(original, read_answers(place)).items()
    ]  # fmt: skip


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it differs from it; None where there is no git checkout."""
    if shutil.which("git") is None:
        return None, None

    def ask(*words: str) -> str:
        place = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain"))
    except subprocess.CalledProcessError:
        return None, None


def _versions() -> dict[str, str]:
    import importlib.metadata

    packages = ("torch", "transformers", "safetensors", "datasets", "numpy")
    return {"cluscomp": __version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def _format() -> int:
    from cluscomp.checkpoint import FORMAT

    return FORMAT


def _device(name: str) -> "torch.device":
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: this machine has no usable GPU; device=cpu or device=auto works")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda")


def _dtype(experiment: Experiment) -> "torch.dtype":
    """The dtype all models compute in: "auto" is float32 on the CPU (bfloat16 is slower there), bfloat16 on a GPU."""
    import torch

    if experiment.dtype != "auto":
        return getattr(torch, experiment.dtype)  # type: ignore[no-any-return]
    return torch.float32 if _device(experiment.device).type == "cpu" else torch.bfloat16
