"""One stage or evaluation of a run in its folder, unless it is finished there.

A folder is named by its key. It is finished when `metrics.json` is there, which is written last and names the key and
the checkpoint's hash; one that names others belongs elsewhere, and is not believed. A process that comes to a folder
where another one works waits, and re-uses what that one leaves. A `fresh` run works in a folder within and puts what it
made in place of what was there.
"""

import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluscomp.data.overlap import WORDS
from cluscomp.errors import InputError
from cluscomp.runs.capsule import commit, versions
from cluscomp.runs.experiment import Experiment, key_settings
from cluscomp.score.tasks import write_answers
from cluscomp.store.files import held_alone
from cluscomp.store.records import content_key, read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cluscomp.data.overlap import Seen
    from cluscomp.models.original import Original

log = logging.getLogger("cluscomp")
ANSWERS = "answers.jsonl.gz"  # to the tasks, of one model
METRICS, CHECKPOINT, FRESH = "metrics.json", "checkpoint", "fresh"


class Runner:
    """Stages and evaluations of an experiment with these keys, by name; "original" is the model before all stages."""

    def __init__(self, experiment: Experiment, outputs: Path, original: "Original", keys: dict[str, str]) -> None:
        self.experiment, self.outputs, self.original, self.keys = experiment, outputs, original, keys
        evaluate = experiment.evaluate
        self.evaluation = [key_settings(evaluate), evaluate.inputs(), original.device.type, versions(), WORDS]
        self.worked = False  # whether anything was computed that had not been finished before
        self._warned: set[str] = set()

    @property
    def key(self) -> str:
        """The run's: a hash of all that decides its record."""
        return content_key([self.keys, self.evaluation, self.experiment.measured, self.experiment.name])

    def read(self) -> dict[str, Any]:
        """Hashes of all that the run reads besides the model, stage by stage, and the keys of the stages."""
        stages = self.experiment.stages
        data = {name: stages[name].inputs() for name in self.experiment.order}
        return {"data": data | {"evaluate": self.experiment.evaluate.inputs()}, "keys": self.keys, "run": self.key}

    def check(self) -> None:
        """Ask every stage that is not finished whether it can work. Raises InputError before any long work."""
        for name in self.experiment.order:
            if self.experiment.fresh or self._finished(self._folder(name)) is None:
                self.experiment.stages[name].check(self.original)
        self.experiment.evaluate.check(self.original)

    def checkpoint(self, name: str) -> Path | None:
        """Where the model after a stage lies; None for the original, which is no checkpoint of ours."""
        return None if name == "original" else self._folder(name) / CHECKPOINT

    def answers(self, name: str) -> Path:
        """Where the answers of the model after a stage to the tasks are, if there were tasks."""
        return self._evaluation_folder(name) / ANSWERS

    def stage(self, name: str) -> dict[str, Any]:
        """The metrics of a stage, which leaves its model in `checkpoint` of its folder."""
        folder = self._folder(name)
        with held_alone(folder, name):
            metrics = self._stage(name, folder)
            _keep_alone(folder, CHECKPOINT, METRICS, "lock")
        return metrics

    def evaluate(self, name: str) -> dict[str, Any]:
        """Scores of the model after stage `name`, and its continuation of the prompt."""
        folder = self._evaluation_folder(name)
        with held_alone(folder, f"evaluate {name}"):
            metrics = self._evaluate(name, folder)
            _keep_alone(folder, METRICS, ANSWERS, "lock")
        return metrics

    def _folder(self, name: str) -> Path:
        return self.outputs / f"{name}-{self.keys[name]}"

    def _evaluation_folder(self, name: str) -> Path:
        return self.outputs / f"evaluate-{content_key([self.keys[name], *self.evaluation])}"

    def _kept_folder(self) -> Path:
        """Where what the original predicts is kept."""
        return self.outputs / f"predictions-{content_key([self.keys['original'], versions()])}"

    def _stage(self, name: str, folder: Path) -> dict[str, Any]:
        from cluscomp import checkpoint
        from cluscomp.forms.layers import check_file, size_of
        from cluscomp.stages import Job

        finished = None if self.experiment.fresh else self._whole(folder)
        if finished is not None:
            log.info("%s  finished before, %s", name, folder)
            tell_of_other_code(name, finished)
            return finished
        self.worked = True
        with _Measured() as cost:
            work = self._work_folder(folder)
            model = self._model_before(name)
            found = self.experiment.stages[name].run(model, Job(work, self.experiment.seed, self.original))
            saved = work / CHECKPOINT
            checkpoint.save(model, self.original.tokenizer, saved)
        counted = size_of(model)
        check_file(counted, checkpoint.tensor_bytes(saved))
        size = asdict(counted) | {"checkpoint_bytes": checkpoint.weight_bytes(saved)}
        hash_ = checkpoint.checkpoint_hash(saved)
        metrics = {"key": _key_of(folder)} | cost | _code() | {"found": found, "size": size, "checkpoint_hash": hash_}
        self._finish(work, metrics, folder, CHECKPOINT)
        return metrics

    def _evaluate(self, name: str, folder: Path) -> dict[str, Any]:
        evaluate = self.experiment.evaluate
        finished = None if self.experiment.fresh else self._finished(folder)
        if finished is not None:
            tell_of_other_code(f"evaluate {name}", finished)
            # The same model may have been reached under another name.
            return finished | {"scores": [row | {"after": name} for row in finished["scores"]]}
        self.worked = True
        with _Measured() as cost:
            work = self._work_folder(folder)
            kept = work / "predictions" if self.experiment.fresh else self._kept_folder()
            seen = evaluate.contamination(self.original, self._seen(name))
            model = self._model(name)
            scores = [asdict(score) for score in evaluate.measure(model, self.original, name, kept)]
            asked, answers = evaluate.ask(model, self.original, name)
            scores += [asdict(score) for score in asked]
            sample = evaluate.sample(model, self.original, name)
        scores = [row | {"seen": seen.get(row["dataset"], {})} for row in scores]
        if answers:
            write_answers(work / ANSWERS, answers)
        metrics = {"key": _key_of(folder)} | cost | _code() | {"scores": scores, "sample": sample}
        for row in scores:
            log.info("evaluate  %s after %s: %.3f on %s", row["metric"], name, row["value"], row["dataset"])
        self._finish(work, metrics, folder, ANSWERS)
        return metrics

    def _work_folder(self, folder: Path) -> Path:
        """Where a stage or evaluation works: in its folder, or if `fresh` in one within that."""
        work = folder / FRESH if self.experiment.fresh else folder
        work.mkdir(exist_ok=True)
        return work

    def _finish(self, work: Path, metrics: dict[str, Any], folder: Path, beside: str) -> None:
        """Write the metrics, and put them and what lies `beside` them into `folder`, in place of what was there."""
        write_sealed(work / METRICS, metrics)
        if work != folder:
            (folder / METRICS).unlink(missing_ok=True)  # first, so that it never stands beside what is not its own
            _remove(folder / beside)
            for name in (beside, METRICS):
                if (work / name).exists():
                    (work / name).rename(folder / name)

    def _seen(self, name: str) -> "dict[str, Seen]":
        """What the stages up to `name` learned from, of those that learned from text."""
        order = ["original", *self.experiment.order]
        found = {
            stage: self.experiment.stages[stage].seen(self.original, self.experiment.seed)
            for stage in order[1 : order.index(name) + 1]
        }
        return {stage: seen for stage, seen in found.items() if seen is not None}

    def _model(self, name: str) -> "PreTrainedModel":
        """The model after a stage."""
        from cluscomp import checkpoint

        folder = self.checkpoint(name)
        if folder is None:
            return self.original.model()
        return checkpoint.load(folder, self.original.dtype, self.original.device)

    def _model_before(self, name: str) -> "PreTrainedModel":
        order = ["original", *self.experiment.order]
        return self._model(order[order.index(name) - 1])

    def _finished(self, folder: Path) -> dict[str, Any] | None:
        """The metrics of a finished stage or evaluation; None without, and, with a warning, for those of another."""
        metrics = read_sealed(folder / METRICS)
        if metrics is None or metrics.get("key") == _key_of(folder):
            return metrics
        self._warn(f"{folder / METRICS} belongs to another folder ({metrics.get('key')}); it is made anew")
        return None

    def _whole(self, folder: Path) -> dict[str, Any] | None:
        """The metrics of a finished stage whose checkpoint is the one they name; otherwise None, with a warning."""
        from cluscomp import checkpoint

        metrics = self._finished(folder)
        if metrics is None:
            return None
        try:
            if checkpoint.checkpoint_hash(folder / CHECKPOINT) == metrics["checkpoint_hash"]:
                return metrics
            self._warn(f"{folder / CHECKPOINT} belongs to another folder; the stage is run again")
        except InputError as error:
            self._warn(f"{error}; the stage is run again")
        return None

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            log.warning("%s", sentence)


class _Measured:
    """Seconds, CPU seconds and peak memory (bytes) of a `with` block, as a dictionary that fills at its end."""

    def __enter__(self) -> dict[str, Any]:
        from cluscomp.process import reset_peak_memory

        reset_peak_memory()
        self.start, self.cpu_start, self.cost = time.monotonic(), time.process_time(), dict[str, Any]()
        return self.cost

    def __exit__(self, *_: object) -> None:
        import torch

        from cluscomp.process import peak_memory

        self.cost |= {
            "seconds": time.monotonic() - self.start,
            "cpu_seconds": time.process_time() - self.cpu_start,
            "peak_ram": peak_memory(),
        }
        if torch.cuda.is_available():
            self.cost["peak_vram"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def tell_of_other_code(what: str, found: dict[str, Any]) -> None:
    """A line in the log if metrics or a record were finished by other code than this."""
    then, now = (_told(one) for one in (found, _code()))
    if then != now:
        log.info("%s  finished before, by %s; this is %s", what, then, now)


def _told(code: dict[str, Any]) -> str:
    commit = f"commit {code['commit'][:12]}" if code.get("commit") else "code of no commit"
    return f"{commit} with changes" if code.get("dirty") else commit


def _key_of(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def _code() -> dict[str, Any]:
    """Of which commit the code is that computes, and whether it differs from it."""
    return dict(zip(("commit", "dirty"), commit()))


def _keep_alone(folder: Path, *names: str) -> None:
    """Remove all else from a folder: what let a killed stage go on, and what killed processes left half-written."""
    for path in folder.iterdir():
        if path.name not in names:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


POLL = 0.2  # seconds between two looks for what the first process writes


class Follower(Runner):
    """A runner that writes nothing: the first process does and writes everything."""

    def stage(self, name: str) -> dict[str, Any]:
        """The metrics of a stage once the first process has written them."""
        from cluscomp.stages import Job

        folder, stage = self._folder(name), self.experiment.stages[name]
        if stage.distributed and self._whole(folder) is None:
            stage.run(self._model_before(name), Job(folder, self.experiment.seed, self.original))
        while (finished := self._whole(folder)) is None:
            time.sleep(POLL)
        return finished

    def evaluate(self, name: str) -> dict[str, Any]:
        """The scores once the first process has written them."""
        while (finished := self._finished(self._evaluation_folder(name))) is None:
            time.sleep(POLL)
        return finished
