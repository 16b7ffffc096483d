"""Whether a record can be reproduced: its scores beside those measured again, and the reasons for a difference."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluscomp.errors import InputError
from cluscomp.runs.cells import read_cell
from cluscomp.store.records import EXTERNAL, ORIGINAL, Record, Score, differences, read_sealed

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 1e-3  # of a value, within which other arithmetic may bring it; of an accuracy also one answer
Verdict = Literal["equal", "within tolerance", "different"]


@dataclass(frozen=True)
class Compared:
    """One score of a record, the same measured again, and in what the measurements differ."""

    after: str
    metric: str
    dataset: str
    recorded: float
    again: float
    verdict: Verdict
    reasons: tuple[str, ...]


def compare(recorded: list[Score], again: list[Score]) -> list[Compared]:
    """Each score beside the one of the same stage, metric and data set that was measured again, where there is one."""
    found = {(score.after, score.metric, score.dataset): score for score in again}
    pairs = [(score, found.get((score.after, score.metric, score.dataset))) for score in recorded]
    return [
        Compared(
            one.after, one.metric, one.dataset, one.value, other.value, _verdict(one, other),
            tuple(f"{there} (then {here})" for here, there in zip(*differences(one.protocol, other.protocol))),
        )
        for one, other in pairs if other is not None
    ]  # fmt: skip


def _verdict(one: Score, other: Score) -> Verdict:
    if one.value == other.value:
        return "equal"
    answer = 1.001 / one.n if "task_hash" in one.protocol else 0.0
    return (
        "within tolerance" if abs(one.value - other.value) <= max(TOLERANCE * abs(one.value), answer) else "different"
    )


def overall(found: list[Compared]) -> Verdict:
    """The verdict on all of them together."""
    verdicts = {one.verdict for one in found}
    return "different" if "different" in verdicts else "within tolerance" if len(verdicts) > 1 else verdicts.pop()


def changed(record: Record, settings: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    """What is not as it was when the record was made: settings, versions of packages, device, kernels."""
    now_set = _flat(settings)
    found = [
        f"{key} = {now_set.get(key)} (then {then})"
        for key, then in _flat(record.config).items()
        if then != now_set.get(key)
    ]
    for key in ("device", "kernels", "platform"):
        then, now = record.machine.get(key), machine.get(key)
        found += [f"{key} = {now} (then {then})"] if then != now else []
    versions = machine.get("versions", {})
    then_versions = record.machine.get("versions", {})
    return found + [
        f"{key} {versions.get(key)} (then {then})" for key, then in then_versions.items() if then != versions.get(key)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def overrides_of(record: Record, outputs: Path) -> list[str]:
    """The overrides that the record's run was started with, from what its cell left. Raises InputError without one."""
    folder = outputs / "cells" / record.run["experiment"]
    for path in sorted(folder.glob("*/cell.json")):
        cell = read_cell(path.parent)
        if Path(cell.record).parent.name == f"run-{record.run['key']}":
            return cell.overrides
    raise InputError(
        f"no cell in {folder} tells how {record.run['name']} was started: give outputs=FOLDER of that run, or its "
        "overrides, say experiment=NAME bits=3"
    )


def checkpoint_of(record: Record, after: str, outputs: Path) -> Path | None:
    """The record's model after a stage, by the hash of its files; None of the original or an external model.

    Raises InputError if no finished stage in `outputs` has it.
    """
    if after in (ORIGINAL, EXTERNAL):
        return None
    wanted = record.stages[after].get("checkpoint_hash")
    for path in sorted(outputs.glob(f"{after}-*/metrics.json")):
        metrics = read_sealed(path)
        if metrics is not None and wanted is not None and metrics.get("checkpoint_hash") == wanted:
            return path.parent / "checkpoint"
    raise InputError(
        f"{outputs}: no finished stage {after} holds the checkpoint of {record.run['name']} ({wanted}); "
        "full=true runs everything again"
    )


def scoring_alone(record: Record, after: str, outputs: Path, original: Path | None) -> list[str]:
    """The overrides under which a run scores a record's model after a stage, and does nothing else.

    `original` is the folder that the stages began with, if there were any: of a GGUF file not its own numbers, but
    those in 16 bits.
    """
    checkpoint = original if after == ORIGINAL else checkpoint_of(record, after, outputs)
    model = [] if checkpoint is None else ["model=hub", f"model.id={quoted(str(checkpoint))}"]
    return [*model, "order=[evaluate]", "evaluate.after=null", "evaluate.distance=false", "evaluate.prompt=null"]


def quoted(value: str) -> str:
    """A value as Hydra takes it whatever characters are in it."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + "\\'" * bool(found[2]), value) + "'"


def verdict_table(record: Record, again: list[Score]) -> "pd.DataFrame":
    """Each score then and now, to eight digits. Raises InputError if there is none."""
    import pandas as pd

    found = compare(record.scores, again)
    if not found:
        raise InputError(f"{record.run['name']}: none of its scores could be measured again")
    return pd.DataFrame(
        [
            {
                "after": one.after, "data": one.dataset, "metric": one.metric, "recorded": f"{one.recorded:.8g}",
                "again": f"{one.again:.8g}", "verdict": one.verdict,
            }
            for one in found
        ]
    )  # fmt: skip


def explained(found: list[Compared]) -> list[str]:
    """All digits of the scores that are not equal, and each difference of protocols once."""
    digits = [
        f"{one.metric} of {one.dataset} after {one.after}: {one.again!r}, recorded {one.recorded!r}"
        for one in found
        if one.verdict != "equal"
    ]
    return digits + [f"the protocol has {reason}" for reason in dict.fromkeys(r for one in found for r in one.reasons)]


def not_again(record: Record, again: list[Score]) -> list[str]:
    """The metrics of a record that were not measured again."""
    return sorted({score.metric for score in record.scores} - {one.metric for one in compare(record.scores, again)})
