"""One run: fold the stages over the model, and write the record.

Of the processes of one run (torchrun, srun) the first tells and writes everything; see runs/runner.py.
"""

import gc
import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluscomp import ranks
from cluscomp.checkpoint import FORMAT
from cluscomp.errors import InputError
from cluscomp.kernels.loading import native
from cluscomp.models.files import combined, file_hashes, fingerprint
from cluscomp.models.original import Original
from cluscomp.models.quantised import opened
from cluscomp.models.sources import GgufModel, read_config
from cluscomp.plan.plan import Plan
from cluscomp.process import join_slurm, processes, rank
from cluscomp.report.page import of_enough_seeds, page
from cluscomp.runs.begun import tell_of_other_code
from cluscomp.runs.capsule import commit, leave_out, seal, versions
from cluscomp.runs.experiment import Experiment, config_of, stage_keys, without_places
from cluscomp.runs.preparation import device_of, dtype_of, foreseen, known_config
from cluscomp.runs.runner import Runner
from cluscomp.runs.trackers import Forgiving, NoTracker, Session, listening
from cluscomp.store.files import held_alone, writable, written_alone
from cluscomp.store.records import EXTERNAL, SCHEMA, Record, Score, content_key, read, write
from cluscomp.store.secrets import hide_all, log_file

log = logging.getLogger("cluscomp")
LOG = "log.txt"  # what the terminal showed, in the run's folder


@dataclass(frozen=True)
class Outcome:
    """What a run left: its record, where that is, its last checkpoint if any, and the models' samples."""

    record: Record
    path: Path
    checkpoint: Path | None
    samples: dict[str, str]


def run(experiment: Experiment, overrides: Sequence[str] = ()) -> Outcome:
    """Run the stages in order and evaluate; finished parts are re-used. Raises InputError for what cannot work.

    `overrides` are what the user gave, for the run's capsule.
    """
    join_slurm()
    config = hide_all(config_of(experiment))
    outputs, cache = writable("outputs", experiment.outputs), writable("cache", experiment.cache)
    first = rank() == 0
    if first:
        leave_out(outputs)
    publish = None if experiment.publish is None or not first else writable("publish", experiment.publish)
    if not experiment.machine.here:
        raise InputError(f"machine={experiment.machine.name}: only `cluscomp plan` works for another machine")
    if rank() >= processes():
        raise InputError(
            f"RANK={rank()} without a WORLD_SIZE above it: there are no other processes to work with; unset RANK, or "
            "start all of them by torchrun"
        )
    if experiment.ranks not in (None, processes()):
        raise InputError(
            f"ranks={experiment.ranks}: there are {processes()} processes here. `cluscomp plan` plans for any number; "
            f"a run has as many as it is started with: torchrun --nproc_per_node {experiment.ranks} -m cluscomp ..."
        )
    with ranks.joined(device_of(experiment.device).type):
        return _run(experiment, config, outputs, cache, publish, list(overrides))


def _run(
    experiment: Experiment,
    config: dict[str, Any],
    outputs: Path,
    cache: Path,
    publish: Path | None,
    overrides: list[str],
) -> Outcome:
    """`run`, with the other processes if there are any; only the first has a place to `publish`."""
    first = rank() == 0
    known = known_config(experiment, cache) if first else None
    predicted = None if known is None else foreseen(experiment, known)
    with held_alone(cache, "model"):
        folder = experiment.model.folder(cache, to_score=experiment.scores_only)
    if first and known is None:  # the model was not here before
        predicted = foreseen(experiment, read_config(folder))
    gc.collect()
    gc.freeze()  # libraries stay anyway: each later collection looks only at what runs make
    device, dtype = device_of(experiment.device), ranks.agreed(lambda: dtype_of(experiment))  # a measurement
    said = {"of": experiment.model.of, "calibration": experiment.model.calibration} if _is_gguf(experiment) else {}
    original = opened(folder, dtype, device, to_score=experiment.scores_only, **said)
    hashes = file_hashes(folder)
    root = {"model": combined(hashes), "dtype": str(dtype), "device": device.type, "format": FORMAT}
    root |= {"said": said} if any(said.values()) else {}
    experiment.evaluate.inputs()  # what is not there is told before the original writes a text of its own
    runner = Runner(experiment, outputs, original, stage_keys(experiment, root))
    if len(set(ranks.gathered(runner.key))) > 1:
        raise InputError("the processes of this run have unlike settings, files or packages; start all of them alike")
    runner.check()
    run_folder = outputs / f"run-{runner.key}"
    if first:
        _log_into(run_folder)
        seal(run_folder, overrides, {"settings": config, "device": str(device), "read": root, **runner.read()})
    tracker = experiment.tracker if first else NoTracker()
    session = Forgiving(tracker, f"{experiment.name}-{runner.key}", config | _chosen(experiment), run_folder)
    try:
        with listening(session.log):
            metrics = _fold(experiment, runner, session)
    except BaseException:
        session.end(None, {})
        raise
    answers = {name: runner.answers(name) for name in experiment.measured if runner.answers(name).is_file()}
    path = run_folder / "record.json"
    weights = combined({name: value for name, value in hashes.items() if name.endswith(".safetensors")})[:16]
    made = _record(experiment, config, runner.key, weights, metrics, original, predicted)
    record = None if runner.worked else _written_before(path, made)
    if record is None:
        record = made
        if first:
            for name, place in answers.items():
                shutil.copy(place, run_folder / f"answers-{name}.jsonl.gz")
            with written_alone(path):
                write(record, path)
    if publish is not None:
        write(record, publish / experiment.name / f"{runner.key}.json")
    summary = {f"{row.after}/{row.dataset}/{row.metric}": row.value for row in record.scores} | record.size
    session.end(summary, {} if isinstance(tracker, NoTracker) else _files(experiment.name, record, path))
    samples = {
        name: metrics[f"evaluate {name}"]["sample"]
        for name in experiment.measured
        if metrics[f"evaluate {name}"]["sample"] is not None
    }
    return Outcome(record, path, runner.checkpoint(["original", *experiment.order][-1]), samples)


def _files(name: str, record: Record, path: Path) -> dict[str, str]:
    """What a tracker keeps of a run, by the files' names: its record, and tables of it if it may stand in some."""
    tables = page(name, [record], "md") if record.scores and of_enough_seeds([record])[0] else {}
    return tables | {"record.json": path.read_text(encoding="utf-8")}


def _fold(experiment: Experiment, runner: Runner, session: Session) -> dict[str, dict[str, Any]]:
    """The metrics of all stages and evaluations, in the order of the run."""
    metrics: dict[str, dict[str, Any]] = {}
    for name in ["original", *experiment.order]:
        if name != "original":
            metrics[name] = runner.stage(name)
            for stage, numbers, step in metrics[name].get("curves", ()) if name in runner.reused else ():
                session.log(stage, {key: float(value) for key, value in numbers.items()}, step)
            session.log(name, _numbers(metrics[name]))
        if name in experiment.measured:
            label = f"evaluate {name}"
            metrics[label] = runner.evaluate(name)
            session.log(label, {f"{row['dataset']}/{row['metric']}": row["value"] for row in metrics[label]["scores"]})
    return metrics


def _written_before(path: Path, made: Record) -> Record | None:
    """The record of an earlier process with the same run and scores, which stays; None if there is no whole one."""
    if not path.is_file():
        return None
    try:
        record = read(path)
        if record.run.get("key") != made.run["key"]:
            raise InputError(f"{path}: the record of another run, {record.run.get('name')}")
    except InputError as error:
        log.warning("%s; it is written anew", error)
        return None
    if _key_of_scores(record) != _key_of_scores(made):
        log.warning("%s: domains of texts, or scores, are other ones since; it is written anew", path)
        return None
    tell_of_other_code(record.run["name"], record.run)
    return record


def _key_of_scores(record: Record) -> str:
    """A hash by which scores are compared, for one that is no number is not equal to itself."""
    return content_key([asdict(score) for score in record.scores])


def _log_into(folder: Path) -> None:
    """Send the project's log lines into `folder`/log.txt, too, and no longer into that of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [handler for handler in log.handlers if handler.name == LOG]:
        log.removeHandler(old)
        old.close()
    handler = log_file(folder / LOG)
    handler.set_name(LOG)
    log.addHandler(handler)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The plain numbers of a stage's metrics, for the tracker."""
    flat = {"seconds": metrics["seconds"], "peak_ram": metrics["peak_ram"]} | metrics["found"] | metrics["size"]
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def _chosen(experiment: Experiment) -> dict[str, Any]:
    """What a tracker groups and filters runs by: the choice of each group, and the commit."""
    choices = hide_all(without_places(experiment.choices))
    return {"choices": {group: one["yaml"] for group, one in choices.items()}, "commit": commit()[0]}


def _is_gguf(experiment: Experiment) -> bool:
    return isinstance(experiment.model, GgufModel)


def _by_another(score: Score, experiment: Experiment, calibration: str | None) -> Score:
    """A score of a model that another library made, whose calibration, where it is known, may be of the text's domain.

    What of the text stood in there word for word is not known.
    """
    domains = {text.name: text.domain for text in experiment.evaluate.texts.values()}
    known = calibration is not None and score.dataset in domains
    seen = {"text": calibration, "in_domain": domains.get(score.dataset) == calibration}
    return replace(score, after=EXTERNAL, seen={EXTERNAL: seen} if known else {})


def _record(
    experiment: Experiment,
    config: dict[str, Any],
    key: str,
    weights: str,
    metrics: dict[str, dict[str, Any]],
    original: Original,
    predicted: Plan | None,
) -> Record:
    scores = [Score(**row) for found in metrics.values() for row in found.get("scores", [])]
    hash_, dirty = commit()
    stages = {
        name: {key: metrics[name][key] for key in ("found", "size", "checkpoint_hash")} for name in experiment.order
    }
    if (external := original.external()) is not None:
        scores = [_by_another(score, experiment, external.get("calibration")) for score in scores]
        stages[EXTERNAL] = {"found": external, "size": original.size(), "checkpoint_hash": fingerprint(original.folder)}
    unclean = any(found.get("dirty") for found in metrics.values())  # of a stage that an earlier process finished
    return Record(
        schema=SCHEMA,
        run={
            "name": f"{experiment.name}-{key}",
            "experiment": experiment.name,
            "key": key,
            "weights": weights,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {name: found["seconds"] for name, found in metrics.items()},
            "cpu_seconds": {name: found["cpu_seconds"] for name, found in metrics.items() if "cpu_seconds" in found},
            "commit": hash_,
            "dirty": unclean or dirty,
            "commits": {name: found["commit"] for name, found in metrics.items() if "commit" in found},
            "status": "finished",
        },
        config=config,
        choices=hide_all(without_places(experiment.choices)),
        scores=scores,
        size=(metrics[experiment.order[-1]]["size"] if experiment.order else {}) | {"original": original.size()},
        machine={
            "device": str(original.device),
            "platform": platform.platform(),
            "kernels": "torch" if native is None else "compiled",
            "versions": versions(),
            "peak_ram": {name: found["peak_ram"] for name, found in metrics.items()},
            "peak_vram": {name: found["peak_vram"] for name, found in metrics.items() if "peak_vram" in found},
            "predicted": None if predicted is None else predicted.predicted(),
        },
        stages=stages,
    )
