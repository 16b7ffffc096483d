"""The cells of a sweep: what each run is doing, in a folder of its own that other processes can read.

`OUTPUTS/cells/NAME/KEY/` holds `cell.json`, `log.txt` and, while a process works there, a lock. KEY is a hash of the
settings, so the same command finds the same cells.
"""

import json
import logging
import os
import platform
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluscomp.errors import InputError
from cluscomp.store.files import held_alone, is_held, new_file
from cluscomp.store.records import content_key, read, write
from cluscomp.store.secrets import hide, log_file

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("cluscomp")
State = Literal["waiting", "running", "interrupted", "failed", "finished"]
FILE, LOG = "cell.json", "log.txt"


@dataclass(frozen=True)
class Cell:
    """One cell: its overrides, its state, since when (UTC), where it works, and its record or what failed."""

    overrides: list[str]
    state: State
    since: str
    place: str = ""
    record: str = ""
    problem: str = ""


def folder_of(outputs: Path, name: str, settings: dict[str, Any]) -> Path:
    """Where the cell with these settings tells of itself."""
    return outputs / "cells" / name / content_key(settings)


def announce(folder: Path, overrides: list[str]) -> None:
    """Let a cell that nobody has worked on yet wait in the list. Raises OSError if that cannot be written."""
    if not (folder / FILE).exists():
        _write(folder, Cell(overrides, "waiting", _now()))


@contextmanager
def at_work(
    folder: Path, overrides: list[str], explain: Callable[[BaseException], tuple[str, int]]
) -> Iterator[list[Path]]:
    """Tell that this process works on a cell, what comes of it, and all its log lines.

    The record's path is to be put into the list. A second process with the same cell waits for the first. `explain`
    makes an exception a sentence (and a code); the exception goes on.
    """
    with held_alone(folder, "the same cell"):
        began = Cell(overrides, "running", _now(), f"process {os.getpid()} on {platform.node()}")
        if not _is_finished(folder):  # else it only is looked at again, and stays finished while that lasts
            _write(folder, began)
        handler = log_file(folder / LOG)
        log.addHandler(handler)
        records: list[Path] = []
        try:
            yield records
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)  # the latter as its job is queued again
            problem = "" if stopped else hide(explain(error)[0])
            with (folder / LOG).open("a", encoding="utf-8") as file:
                file.write(hide(traceback.format_exc()))
            _write(folder, replace(began, state="interrupted" if stopped else "failed", since=_now(), problem=problem))
            raise
        finally:
            log.removeHandler(handler)
            handler.close()
        _write(folder, replace(began, state="finished", since=_now(), record=os.path.relpath(records[0], folder)))


def read_cell(folder: Path) -> Cell:
    """What a cell tells. One that says it is running while nobody holds it was killed: it was interrupted."""
    cell = _read(folder)
    if cell.state == "running" and not is_held(folder):
        cell = _read(folder)  # it may have ended since
        return replace(cell, state="interrupted") if cell.state == "running" else cell
    return cell


def read_cells(outputs: Path, name: str) -> dict[Path, Cell]:
    """All cells of a sweep by their folder. Raises InputError, with the sweeps there are, if it has none."""
    place = outputs / "cells"
    folders = sorted(path.parent for path in (place / name).glob(f"*/{FILE}"))
    if not folders:
        others = sorted(path.name for path in place.glob("*")) if place.is_dir() else []
        raise InputError(f"no cells of '{name}' in {place}; there are: {', '.join(others) or 'none'}")
    return {folder: read_cell(folder) for folder in folders}


def status_table(cells: dict[Path, Cell]) -> "pd.DataFrame":
    """One row for each cell: overrides that are not common to all, state, and where it stands or why it failed.

    Of a finished one the perplexities after its last stage.
    """
    import pandas as pd

    names = names_of(cells)
    return pd.DataFrame(
        [
            {
                "cell": names[folder],
                "state": cell.state,
                "since": cell.since,
                "where it stands": cell.problem or _scores(folder, cell) or _last_line(folder),
            }
            for folder, cell in sorted(cells.items(), key=lambda one: one[1].overrides)
        ]
    )


def names_of(cells: dict[Path, Cell]) -> dict[Path, str]:
    """For each cell the overrides that are not common to all."""
    common = set.intersection(*(set(cell.overrides) for cell in cells.values())) if len(cells) > 1 else set()
    return {
        folder: " ".join(item for item in cell.overrides if item not in common) or "(no overrides)"
        for folder, cell in cells.items()
    }


def collect(cells: dict[Path, Cell], into: Path) -> list[Path]:
    """Copy the records of all cells into a folder, as KEY.json.

    Raises InputError, and copies nothing, unless every cell is finished and was run from a clean commit, or by an
    installed package, which is of no commit: its record names the version.
    """
    undone = [(folder, cell) for folder, cell in cells.items() if cell.state != "finished"]
    if undone:
        folder, cell = undone[0]
        first = f"{' '.join(cell.overrides)} is {cell.state}"
        raise InputError(
            f"{len(undone)} of {len(cells)} cells are not finished ({first}): run the sweep again, or remove {folder} "
            "to leave that cell out"
        )
    found = [read((folder / cell.record).resolve()) for folder, cell in cells.items()]
    for record in found:
        if record.run["dirty"]:
            raise InputError(
                f"{record.run['name']} was run from a tree with changes that are in no commit "
                f"({record.run['commit']}): commit, and run it again with new outputs"
            )
    for record in found:
        write(record, into / f"{record.run['key']}.json")
    return [into / f"{record.run['key']}.json" for record in found]


def _is_finished(folder: Path) -> bool:
    """Whether a cell was finished, and its record is still there."""
    try:
        cell = read_cell(folder)
    except FileNotFoundError:
        return False
    return cell.state == "finished" and (folder / cell.record).is_file()


def _read(folder: Path) -> Cell:
    return Cell(**json.loads((folder / FILE).read_text()))


def _write(folder: Path, cell: Cell) -> None:
    with new_file(folder / FILE) as unfinished:
        unfinished.write_text(json.dumps(asdict(cell), indent=1) + "\n")


def _scores(folder: Path, cell: Cell) -> str:
    """The perplexities of a finished cell after the last stage that was measured.

    Nothing if there are none, or its record cannot be read.
    """
    if cell.state != "finished" or not (folder / cell.record).is_file():
        return ""
    try:
        scores = read((folder / cell.record).resolve()).scores
    except InputError:  # of an earlier schema, or damaged, which `collect` tells
        return ""
    found = [score for score in scores if score.metric == "perplexity"]
    return ", ".join(f"perplexity {one.value:.2f} {one.dataset}" for one in found if one.after == found[-1].after)


def _last_line(folder: Path) -> str:
    """The end of the cell's log without its time, on one line."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return re.sub(r"\s+", " ", re.sub(r"^\d{4}-\d\d-\d\d [\d:,]+ ", "", last))[:100]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
