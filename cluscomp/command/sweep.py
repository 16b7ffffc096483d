"""Runs and sweeps from the command line: one cell or many, plans, and what came out."""

import logging
import math
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cluscomp.command.compose import check_processes, compose_for, explain
from cluscomp.errors import InputError
from cluscomp.plan.machine import write_calibration
from cluscomp.process import join_slurm, processes, rank, time_left
from cluscomp.runs.cells import Cell, announce, at_work, folder_of, names_of, read_cell, status_table
from cluscomp.runs.experiment import ASIDE, Experiment, settings_of
from cluscomp.store.files import is_held, writable
from cluscomp.store.records import objective
from cluscomp.store.secrets import hide, hide_override, printable

if TYPE_CHECKING:
    import pandas as pd

    from cluscomp.runs.run import Outcome


log = logging.getLogger("cluscomp")


def run_one(experiment: Experiment) -> float | None:
    """The score that a search looks at (`objective`), or None if it was not measured."""
    outcome = run_cell(experiment, _given())
    if rank() > 0:
        return None
    show(outcome)
    return objective(outcome.record, experiment.objective)


def run_cell(experiment: Experiment, given: list[str]) -> "Outcome":
    """The finished run of an experiment, which tells of itself in its cell; `given` are the overrides that made it."""
    from cluscomp.runs.run import run

    if rank() > 0:
        return run(experiment)
    overrides = _without_places(given)
    with at_work(_folder(experiment), overrides, explain) as records:
        outcome = run(experiment, overrides)
        records.append(outcome.path)
    return outcome


def _given() -> list[str]:
    """The overrides of the command line, or of a sweep's cell, as they were typed."""
    said: Any = HydraConfig.get().overrides
    return list(OmegaConf.to_container(said.task, resolve=False))  # type: ignore[arg-type]


def _without_places(given: list[str]) -> list[str]:
    """Overrides as they are written down: without places on this machine, and with what is secret hidden."""
    return [hide_override(item) for item in given if item.partition("=")[0] not in (*ASIDE, "trust")]


def _folder(experiment: Experiment) -> Path:
    """The folder where this run tells of itself."""
    return folder_of(writable("outputs", experiment.outputs), experiment.name, settings_of(experiment))


def sweep(arguments: list[str]) -> None:
    """All cells are composed and listed before the first one works; one that fails does not stop the others.

    Cells at which another process is at work are put aside and come last. Of a search (hydra/sweeper=...), which makes
    its cells as it goes, nothing is known before. Raises InputError in one of several processes: each would choose
    cells for itself.
    """
    check_processes()
    join_slurm()
    if processes() > 1:
        raise InputError(
            f"-m: one process starts the cells, and there are {processes()} here; for several at each cell: "
            "hydra/launcher=slurm hydra.launcher.tasks_per_node=N"
        )
    folders: list[Path] = []
    aside: set[Path] = set()

    def list_it(experiment: Experiment) -> None:
        if HydraConfig.get().runtime.choices["hydra/sweeper"] != "basic":
            raise InputError("a search is asked for on the command line: hydra/sweeper=NAME")
        folders.append(_folder(experiment))
        announce(folders[-1], _without_places(_given()))

    searching = any(re.match(r"\+*hydra/sweeper=(?!basic$)", item) for item in arguments)
    if not searching:
        sys.argv[1:] = [item for item in arguments if not re.match(r"\+*hydra[/.]launcher", item)]
        compose_for(list_it)
        sys.argv[1:] = arguments
    try:
        cells = {folder: read_cell(folder) for folder in folders}
        again = frozenset(folder.name for folder, cell in cells.items() if cell.state in ("failed", "interrupted"))
        started = Started(names_of(cells), time.monotonic(), again)
        compose_for(_run_one_of_many if searching else partial(_run_or_put_aside, aside=aside, started=started))
        if aside:
            compose_for(partial(_run_what_was_put_aside, aside=aside))
    except Exception as error:  # of a launcher, say of a job that its scheduler ended
        if searching:
            raise
        print(f"cluscomp: {printable(hide(explain(error)[0]))}", file=sys.stderr)
    if not searching:
        show_cells({folder: read_cell(folder) for folder in folders})


@dataclass(frozen=True)
class Started:
    """The names of a sweep's cells by their folder, in the order in which they run, and when the first began.

    `again` has the keys of those that had failed or were interrupted by then.
    """

    cells: dict[Path, str]
    at: float
    again: frozenset[str]

    def tell(self, folder: Path) -> None:
        """Say which cell begins, and how long this one and the others will take if they are like those before."""
        done = list(self.cells).index(folder)
        left = (time.monotonic() - self.at) / done * (len(self.cells) - done) if done else math.nan
        log.info("%s", f"cell {done + 1} of {len(self.cells)}  {self.cells[folder]}  {time_left(left)}".rstrip())


def _run_or_put_aside(experiment: Experiment, aside: set[Path], started: Started) -> float | None:
    """Run a cell, unless another process is at work at it. (A job, which has one cell alone, waits for that one.)

    With `retry` only cells that had failed or were interrupted are run: all ranks of a job are to do the same.
    """
    folder = _folder(experiment)
    if experiment.retry and folder.name not in started.again:
        return None
    if HydraConfig.get().runtime.choices["hydra/launcher"] == "basic":  # which works at one cell after the other
        if is_held(folder):
            aside.add(folder)
            return None
        started.tell(folder)
    return _run_one_of_many(experiment)


def _run_what_was_put_aside(experiment: Experiment, aside: set[Path]) -> float | None:
    return _run_one_of_many(experiment) if _folder(experiment) in aside else None


def _run_one_of_many(experiment: Experiment) -> float | None:
    """A cell's failure is told and written down by itself; to a search it has no score."""
    try:
        return run_one(experiment)
    except Exception as error:
        print(f"cluscomp: {printable(hide(explain(error)[0]))}", file=sys.stderr)
        return None


def show_plan(experiment: Experiment) -> None:
    """Print the plan; what does not fit is told as a run would tell it."""
    from cluscomp.runs.preparation import planned

    found = planned(experiment)
    print(found.table())
    found.refuse()


def calibrate(experiment: Experiment) -> None:
    """Measure what this machine can do, keep it for later plans, and print the plan."""
    from cluscomp.plan.calibrate import measure

    path = write_calibration(Path(experiment.cache).expanduser(), measure())
    print(f"measured: {path}")
    show_plan(experiment)


def show(outcome: "Outcome") -> None:
    """Print a run's table if anything was measured, what the models made of the prompt, and where everything lies."""
    from cluscomp.report.tables import legend, stage_table, task_table

    records = [outcome.record]
    for table in (stage_table(records), task_table(records)) if outcome.record.scores else ():
        if len(table):
            show_table(table.drop(columns="run"))
            print("".join(f"{line}\n" for line in legend(table)), end="")
    for name, sample in outcome.samples.items():
        print(f"{name}: {sample!r}")
    if outcome.checkpoint is not None:
        print(f"checkpoint  {outcome.checkpoint}")
    print(f"record      {outcome.path}")


def show_table(table: "pd.DataFrame") -> None:
    """Print a table, whatever names are in it; on a terminal within its width."""
    from cluscomp.report.rendering import for_terminal

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(f"\n{for_terminal(table, width)}\n")


def show_cells(cells: dict[Path, Cell]) -> None:
    """Print what the cells of a sweep do. Exit code 1 unless all are finished."""
    show_table(status_table(cells))
    undone = sum(cell.state != "finished" for cell in cells.values())
    if undone:
        print(
            f"{undone} of {len(cells)} cells are not finished; the sweep's command goes on with them", file=sys.stderr
        )
        sys.exit(1)
