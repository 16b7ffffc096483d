"""One stage or evaluation of a run in its folder, unless it is finished there.

A folder is named by its key. It is finished when `metrics.json` is there, which is written last and names the key and
the checkpoint's hash; one that names others belongs elsewhere, and is not believed. It also names the hash of the
checkpoint that was worked on or scored: what was made of another one, as a stage was made anew, is made anew, too. A
process that comes to a folder where another one works waits, and re-uses what that one leaves. A `fresh` run works in a
folder within and puts what it made in place of what was there; it goes on from parts of the same, clean commit alone.

Of the ranks of a run the first looks what is finished, holds the folder and writes; stages that are `distributed`, and
evaluations, are worked at by all.
"""

import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cluscomp import checkpoint, ranks
from cluscomp.data.overlap import WORDS, Learned
from cluscomp.errors import InputError
from cluscomp.forms.layers import check_file, size_of
from cluscomp.models import dense
from cluscomp.models.opened import Opened
from cluscomp.models.original import Original
from cluscomp.runs.begun import begin, begun, code, keep_alone, remove, tell_of_other_code
from cluscomp.runs.capsule import versions
from cluscomp.runs.card import card
from cluscomp.runs.experiment import Experiment, key_settings
from cluscomp.runs.measured import Measured
from cluscomp.runs.trackers import listening
from cluscomp.score.answers import read_answers, write_answers
from cluscomp.stages import Job
from cluscomp.stages.blockwise import dense_blocks
from cluscomp.stages.evaluate import Evaluation
from cluscomp.store.files import held_by_first
from cluscomp.store.records import content_key, read_sealed, write_sealed
from cluscomp.store.secrets import hide
from cluscomp.store.tensor_files import tensor_bytes, weight_bytes

log = logging.getLogger("cluscomp")
ANSWERS = "answers.jsonl.gz"  # to the tasks, of one model
METRICS, CHECKPOINT, FRESH = "metrics.json", "checkpoint", "fresh"


class Runner:
    """Stages and evaluations of an experiment with these keys, by name; "original" is the model before all stages."""

    def __init__(self, experiment: Experiment, outputs: Path, original: Original, keys: dict[str, str]) -> None:
        self.experiment, self.outputs, self.original, self.keys = experiment, outputs, original, keys
        evaluate = experiment.evaluate
        self.evaluation = [key_settings(evaluate), evaluate.inputs(), original.device.type, versions(), WORDS]
        self.worked = False  # whether anything was computed that had not been finished before
        self.reused: set[str] = set()  # stages that had been finished before
        self._warned: set[str] = set()
        self._hashes: dict[str, str] = {}  # of the checkpoints after the stages so far

    @property
    def key(self) -> str:
        """The run's: a hash of all that decides its record."""
        return content_key([self.keys, self.evaluation, self.experiment.measured, self.experiment.name])

    def read(self) -> dict[str, Any]:
        """Hashes of all that the run reads besides the model, stage by stage, and the keys of the stages."""
        found = {name: self.experiment.stages[name].learns_from() for name in self.experiment.order}
        data = {name: {} if one is None else {one.name: one.sha256} for name, one in found.items()}
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
        with held_by_first(folder, name):
            metrics = self._stage(name, folder)
            if ranks.rank() == 0:
                keep_alone(folder, CHECKPOINT, METRICS, "lock")
        self._hashes[name] = metrics["checkpoint_hash"]
        return metrics

    def evaluate(self, name: str) -> dict[str, Any]:
        """Scores of the model after stage `name`, and its continuation of the prompt."""
        folder = self._evaluation_folder(name)
        with held_by_first(folder, f"evaluate {name}"):
            metrics = self._evaluate(name, folder)
            if ranks.rank() == 0:
                keep_alone(folder, METRICS, ANSWERS, "lock")
        return metrics

    def _folder(self, name: str) -> Path:
        return self.outputs / f"{name}-{self.keys[name]}"

    def _evaluation_folder(self, name: str) -> Path:
        flips = ["flips"] if self._counts_flips(name) else []
        return self.outputs / f"evaluate-{content_key([self.keys[name], *self.evaluation, *flips])}"

    def _counts_flips(self, name: str) -> bool:
        """Whether the model's answers to tasks are compared with the original's, which then are there before."""
        return (
            name != "original" and "original" in self.experiment.measured and bool(self.experiment.evaluate.tasks.names)
        )

    def _kept_folder(self) -> Path:
        """Where what the original predicts is kept."""
        return self.outputs / f"predictions-{content_key([self.keys['original'], versions()])}"

    def _stage(self, name: str, folder: Path) -> dict[str, Any]:
        finished = ranks.agreed(lambda: self._finished_or_begun(name, folder))
        if finished is not None:
            log.info("%s  finished before, %s", name, folder)
            tell_of_other_code(name, finished)
            self.reused.add(name)
            return finished
        self.worked = True
        together = self.experiment.stages[name].distributed
        if together and ranks.rank() > 0:  # beside the first rank, which is in `_made` meanwhile
            model, job = self._start(name, self._work_folder(folder))
            self.experiment.stages[name].run(model, job)
            ranks.wait()
        return ranks.agreed(lambda: self._made(name, folder, together=together))

    def _made(self, name: str, folder: Path, *, together: bool) -> dict[str, Any]:
        """Run a stage and write what it makes; the metrics. Unless `together` the other ranks are no part of it."""
        curves: list[tuple[Any, ...]] = []  # what trackers are told, for those of later runs that re-use the stage
        with Measured() as cost, listening(lambda *point: curves.append(point)):
            with nullcontext() if together else ranks.alone():
                model, job = self._start(name, self._work_folder(folder))
                found = self.experiment.stages[name].run(model, job)
                ranks.wait()  # until none looks at a file of the stage
            size = self._keep(name, model, job)
        hash_ = checkpoint.checkpoint_hash(job.folder / CHECKPOINT)
        metrics = {"key": _key_of(folder)} | cost | {"found": found, "size": size, "checkpoint_hash": hash_}
        metrics |= {"curves": curves} | begun(job.folder)
        self._finish(job.folder, metrics, folder, CHECKPOINT)
        return metrics

    def _evaluate(self, name: str, folder: Path) -> dict[str, Any]:
        evaluate = self.experiment.evaluate
        of = self._hashes.get(name)
        finished = ranks.agreed(lambda: self._scored_before(folder, of))
        if finished is not None:
            tell_of_other_code(f"evaluate {name}", finished)
            # The same model may have been reached under another name.
            scores = evaluate.marked(finished["scores"], self._learned(name))
            return finished | {"scores": [row | {"after": name} for row in scores]}
        self.worked = True
        with Measured() as cost:
            work, before = self._work_folder(folder), self.answers("original")
            found = evaluate.evaluate(
                self._model(name), self.original, name, self._learned(name),
                work / "predictions" if self.experiment.fresh else self._kept_folder(),
                seed=self.experiment.seed,
                before=read_answers(before) if self._counts_flips(name) and before.is_file() else (),
            )  # fmt: skip
        return ranks.agreed(lambda: self._scored(name, found, cost, work, folder))

    def _scored_before(self, folder: Path, of: str | None) -> dict[str, Any] | None:
        """The metrics of a finished evaluation; None for a `fresh` one, of which nothing was begun then, either."""
        if self.experiment.fresh:
            keep_alone(self._work_folder(folder))
            return None
        return self._finished(folder, of)

    def _scored(self, name: str, found: Evaluation, cost: dict[str, Any], work: Path, folder: Path) -> dict[str, Any]:
        """Write what was found of a model, and tell of it; the metrics."""
        if found.answers:
            write_answers(work / ANSWERS, found.answers)
        scores = [asdict(score) for score in found.scores]
        sample = found.sample and hide(found.sample)  # it begins with the prompt
        metrics = {"key": _key_of(folder)} | cost | code() | {"scores": scores, "sample": sample}
        metrics["of"] = self._hashes.get(name)
        for score in found.scores:
            log.info("evaluate  %s after %s: %.3f on %s", score.metric, name, score.value, score.dataset)
        self._finish(work, metrics, folder, ANSWERS)
        return metrics

    def _work_folder(self, folder: Path) -> Path:
        """Where a stage or evaluation works: in its folder, or if `fresh` in one within that."""
        work = folder / FRESH if self.experiment.fresh else folder
        work.mkdir(parents=True, exist_ok=True)
        return work

    def _finish(self, work: Path, metrics: dict[str, Any], folder: Path, beside: str) -> None:
        """Write the metrics, and put them and what lies `beside` them into `folder`, in place of what was there."""
        write_sealed(work / METRICS, metrics)
        if work != folder:
            (folder / METRICS).unlink(missing_ok=True)  # first, so that it never stands beside what is not its own
            remove(folder / beside)
            for name in (beside, METRICS):
                if (work / name).exists():
                    (work / name).rename(folder / name)

    def _learned(self, name: str) -> dict[str, Learned]:
        """What the stages up to `name` learned from, of those that learned from text."""
        order = ["original", *self.experiment.order]
        found = {stage: self.experiment.stages[stage].learns_from() for stage in order[1 : order.index(name) + 1]}
        return {stage: learned for stage, learned in found.items() if learned is not None}

    def _model(self, name: str) -> PreTrainedModel | Original:
        """The model after a stage; of a dense one, what reads it from its folder."""
        if self._is_dense(name):
            return self._dense(name)
        if self.experiment.shard:
            return self._opened(name)
        return checkpoint.load(self._folder(name) / CHECKPOINT, self.original.dtype, self.original.device)

    def _opened(self, name: str) -> Opened:
        """What reads the compressed model after a stage block by block."""
        return Opened(self._folder(name) / CHECKPOINT, self.original.dtype, self.original.device)

    def _is_dense(self, name: str) -> bool:
        return name == "original" or self.experiment.stages[name].gives == "original"

    def _dense(self, name: str) -> Original:
        """What reads the model after a dense stage."""
        if name == "original":
            return self.original
        return Original(self._folder(name) / CHECKPOINT, self.original.dtype, self.original.device)

    def _start(self, name: str, work: Path) -> tuple[PreTrainedModel, Job]:
        """The model that a stage begins with, and its job, which reads weights as the last dense stage left them."""
        before = ["original", *self.experiment.order][: self.experiment.order.index(name) + 1]
        original = self._dense([one for one in before if self._is_dense(one)][-1])
        job = Job(work, self.experiment.seed, original, self.original)
        if self._is_dense(before[-1]):
            return original.model(), job
        if self.experiment.shard and getattr(self.experiment.stages[name], "shards", False):
            opened = self._opened(before[-1])
            return opened.model(), replace(job, opened=opened)
        folder = self._folder(before[-1]) / CHECKPOINT
        return checkpoint.load(folder, self.original.dtype, self.original.device), job

    def _keep(self, name: str, model: PreTrainedModel, job: Job) -> dict[str, Any]:
        """Write the model after a stage into its folder; returns its size as it lies there."""
        folder = job.folder / CHECKPOINT
        if self._is_dense(name):
            dense.save(model, dense_blocks(job.folder, model), job.original, folder)
            written = Original(folder, self.original.dtype, self.original.device)
            return {"ledger": {"kept": 8 * tensor_bytes(folder)}} | written.size()
        counted = size_of(model)
        text = card(self.experiment, name, counted, self.original.config)
        first = self.original
        checkpoint.save(model, first.tokenizer, folder, first.stored_dtype, text, first.folder)
        check_file(counted, tensor_bytes(folder))
        return asdict(counted) | {"checkpoint_bytes": weight_bytes(folder)}

    def _before(self, name: str) -> str | None:
        """The hash of the checkpoint that a stage works on; None for the original, which the key names."""
        before = ["original", *self.experiment.order][self.experiment.order.index(name)]
        return self._hashes.get(before)

    def _finished(self, folder: Path, of: str | None = None) -> dict[str, Any] | None:
        """The metrics of a finished stage or evaluation; None without, and, with a warning, for those of another.

        `of` is the hash of the checkpoint that it must have worked on, if that is known.
        """
        metrics = read_sealed(folder / METRICS)
        if metrics is None:
            return None
        if metrics.get("key") != _key_of(folder):
            self._warn(f"{folder / METRICS} belongs to another folder ({metrics.get('key')}); it is made anew")
            return None
        if of is not None and metrics.get("of", of) != of:  # metrics of before there was `of` are believed
            self._warn(f"{folder / METRICS} is of a checkpoint that was made anew since; it is made anew, too")
            return None
        return metrics

    def _finished_or_begun(self, name: str, folder: Path) -> dict[str, Any] | None:
        """The metrics of a stage that need not be made; else None, and it is begun or gone on with."""
        of, fresh = self._before(name), self.experiment.fresh
        metrics = None if fresh else self._whole(folder, of)
        if metrics is None:
            begin(name, self._work_folder(folder), of, fresh=fresh)
        return metrics

    def _whole(self, folder: Path, of: str | None) -> dict[str, Any] | None:
        """The metrics of a finished stage whose checkpoint is the one they name; otherwise None, with a warning."""
        metrics = self._finished(folder, of)
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


def _key_of(folder: Path) -> str:
    return folder.name.rpartition("-")[2]
