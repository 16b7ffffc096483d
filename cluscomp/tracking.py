"""Where numbers go while a run works: progress lines, and W&B as a mirror of the record. Decides nothing."""

import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from cluscomp.costs import give_memory_back
from cluscomp.errors import InputError

log = logging.getLogger("cluscomp")


class Progress:
    """One line for each block of a stage: what was measured, seconds, peak memory, time left."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done, self.steps = stage, total, 0, 0
        self.start = self.last = time.monotonic()

    def skip(self, blocks: int) -> None:
        """Count blocks that an earlier run finished."""
        self.done += blocks
        log.info("%s  %d of %d blocks were done before", self.stage, blocks, self.total)

    def step(self, text: str) -> None:
        """Log that one more block is done."""
        now = time.monotonic()
        self.done, self.steps = self.done + 1, self.steps + 1
        left = (now - self.start) / self.steps * (self.total - self.done)
        log.info(
            "%s  block %*d/%d  %s  %5.1f s  %.2f GiB  %d:%02d left",
            self.stage, len(str(self.total)), self.done, self.total, text, now - self.last,
            peak_memory() / 2**30, *divmod(round(left), 60),
        )  # fmt: skip
        self.last = now


def peak_memory() -> int:
    """Most resident memory of this process since `reset_peak_memory`, in bytes (Linux; elsewhere since its start)."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Let `peak_memory` start anew, where the system allows it, with what is freed given back to the system."""
    gc.collect()
    give_memory_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("peak memory cannot be reset here: figures cover the whole process")


class Tracker(Protocol):
    """A place that receives what the record receives."""

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> None:
        """A run starts; `folder` is where local files may go."""
        ...

    def log(self, stage: str, numbers: dict[str, Any]) -> None:
        """A stage ended with these numbers."""
        ...

    def end(self, summary: dict[str, Any] | None) -> None:
        """The run ended; `summary` holds scores and size, flat; None: it failed."""
        ...


class Forgiving:
    """A tracker whose failure ends in one warning: the run goes on without it, for the record is enough."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.works = tracker, True

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> None:
        """A run starts. Raises InputError for what the user can mend at once, a package that is not installed."""
        self._try(lambda: self.tracker.begin(name, config, folder))

    def log(self, stage: str, numbers: dict[str, Any]) -> None:
        """A stage ended with these numbers."""
        self._try(lambda: self.tracker.log(stage, numbers))

    def end(self, summary: dict[str, Any] | None) -> None:
        """The run ended."""
        self._try(lambda: self.tracker.end(summary))

    def _try(self, call: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            call()
        except InputError:
            raise
        except Exception as error:
            self.works = False
            log.warning("this run is tracked no further (%s); its record will be whole", " ".join(str(error).split()))


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class NoTracker:
    """Track nothing: the record is enough."""

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> None:
        """Nothing to do."""

    def log(self, stage: str, numbers: dict[str, Any]) -> None:
        """Nothing to do."""

    def end(self, summary: dict[str, Any] | None) -> None:
        """Nothing to do."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class WandbTracker:
    """Weights & Biases. "offline" needs no key and no network; `wandb sync` uploads later.

    The server is waited for at most `timeout` seconds, at the beginning and at the end. Online a run that goes on after
    it was killed goes on there, too. W&B does not learn the command line, which its own metadata would hold.
    """

    project: str
    entity: str | None
    mode: Literal["online", "offline"]
    timeout: float = Field(gt=0)

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> None:
        """Start the run. Raises InputError if wandb is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise InputError("tracker=wandb needs the package: pip install 'cluscomp[wandb]'") from error
        quiet = wandb.Settings(
            init_timeout=self.timeout, finish_timeout=self.timeout, silent=True, disable_git=True, x_disable_meta=True
        )
        wandb.init(
            project=self.project, entity=self.entity, mode=self.mode, name=name, id=name, config=config,
            dir=str(folder), resume="allow" if self.mode == "online" else None, settings=quiet,
        )  # fmt: skip

    def log(self, stage: str, numbers: dict[str, Any]) -> None:
        """One step of the run, named after the stage."""
        import wandb

        wandb.log({f"{stage}/{key}": value for key, value in numbers.items()})

    def end(self, summary: dict[str, Any] | None) -> None:
        """Store the summary and close the run; without one as failed."""
        import wandb

        if wandb.run is not None and summary is not None:
            wandb.run.summary.update(summary)
        wandb.finish(exit_code=int(summary is None))
