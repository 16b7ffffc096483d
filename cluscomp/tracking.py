"""Where numbers go while a run works: progress lines, and W&B or TensorBoard as mirrors of them and of the record.

Decides nothing. What a stage says of a block or a step goes through its progress lines, which carry numbers (`told`).
"""

import gc
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from cluscomp.costs import give_memory_back
from cluscomp.errors import InputError

log = logging.getLogger("cluscomp")


def told(stage: str, numbers: dict[str, float], step: int) -> dict[str, Any]:
    """What a log line takes as `extra` for these numbers to reach a tracker."""
    return {"numbers": (stage, numbers, step)}


class Progress:
    """One line for each block of a stage: what was measured, seconds, peak memory, time left."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done, self.steps = stage, total, 0, 0
        self.start = self.last = time.monotonic()

    def skip(self, blocks: int) -> None:
        """Count blocks that an earlier run finished."""
        self.done += blocks
        log.info("%s  %d of %d blocks were done before", self.stage, blocks, self.total)

    def step(self, text: str, **numbers: float) -> None:
        """Log that one more block is done, with a text of what was measured; the numbers are for a tracker."""
        now = time.monotonic()
        self.done, self.steps = self.done + 1, self.steps + 1
        left = (now - self.start) / self.steps * (self.total - self.done)
        seconds, peak = now - self.last, peak_memory()
        numbers |= {"seconds": seconds, "peak_ram": peak}
        log.info(
            "%s  block %*d/%d  %s  %5.1f s  %.2f GiB  %d:%02d left",
            self.stage, len(str(self.total)), self.done, self.total, text, seconds, peak / 2**30,
            *divmod(round(left), 60), extra=told(f"{self.stage} blocks", numbers, self.done),
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


class Session(Protocol):
    """A place that receives what the record of one run receives."""

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """A stage ended with these numbers; or so far it came, in blocks or optimiser steps."""
        ...

    def end(self, summary: dict[str, Any] | None) -> None:
        """The run ended; `summary` holds scores and size, flat; None: it failed."""
        ...


class Tracker(Protocol):
    """The settings of such a place."""

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> Session:
        """A run starts; `folder` is where local files may go. Raises InputError without the package it needs."""
        ...


class Nowhere:
    """A session that keeps nothing."""

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """Nothing to do."""

    def end(self, summary: dict[str, Any] | None) -> None:
        """Nothing to do."""


class Forgiving:
    """A session whose failure ends in one warning: the run goes on without it, for the record is enough.

    What the user can mend at once, a package that is not installed, is raised (InputError).
    """

    def __init__(self, tracker: Tracker, name: str, config: dict[str, Any], folder: Path) -> None:
        self.session: Session = Nowhere()
        with self._warned():
            self.session = tracker.begin(name, config, folder)

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """A stage ended with these numbers, or so far it came."""
        with self._warned():
            self.session.log(stage, numbers, step)

    def end(self, summary: dict[str, Any] | None) -> None:
        """The run ended."""
        with self._warned():
            self.session.end(summary)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the numbers in all progress lines, too."""
        listener = _Listener(self)
        log.addHandler(listener)
        try:
            yield
        finally:
            log.removeHandler(listener)

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            self.session = Nowhere()
            log.warning("this run is tracked no further (%s); its record will be whole", " ".join(str(error).split()))


class _Listener(logging.Handler):
    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on the numbers that a line carries."""
        if hasattr(record, "numbers"):
            self.session.log(*record.numbers)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class NoTracker:
    """Track nothing: the record is enough."""

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> Session:  # noqa: ARG002
        """Nothing to do."""
        return Nowhere()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class WandbTracker:
    """Weights & Biases. "offline" needs no key and no network; `wandb sync` uploads later. "auto" is online with a key.

    The server is waited for at most `timeout` seconds, at the beginning and at the end. Online a run that goes on after
    it was killed goes on there, too. W&B does not learn the command line, which its own metadata would hold.
    """

    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    timeout: float = Field(gt=0)

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> Session:
        """Start the run. Raises InputError if wandb is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise InputError("tracker=wandb needs the package: pip install 'cluscomp[wandb]'") from error
        mode = self.mode if self.mode != "auto" else "online" if _has_key() else "offline"
        quiet = wandb.Settings(
            init_timeout=self.timeout, finish_timeout=self.timeout, silent=True, disable_git=True, x_disable_meta=True
        )
        run = wandb.init(
            project=self.project, entity=self.entity, mode=mode, name=name, id=name, group=config.get("name"),
            config=config, dir=str(folder), resume="allow" if mode == "online" else None, settings=quiet,
        )  # fmt: skip
        log.info("W&B  %s, %s%s", mode, folder / "wandb", "; `wandb sync` uploads it" if mode == "offline" else "")
        return _WandbSession(run)


class _WandbSession:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """One line of the run's history, each number named STAGE/NUMBER."""
        numbers = numbers if step is None else numbers | {"step": step}
        self.run.log({f"{stage}/{key}": value for key, value in numbers.items()})

    def end(self, summary: dict[str, Any] | None) -> None:
        """Store the summary and close the run; without one as failed."""
        if summary is not None:
            self.run.summary.update(summary)
        self.run.finish(exit_code=int(summary is None))


def _has_key() -> bool:
    """Whether there is a key for W&B, which its server takes."""
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception as error:
        log.warning("W&B  cannot be reached with this key: %s", " ".join(str(error).split()))
        return False


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class TensorboardTracker:
    """TensorBoard's files, in `tensorboard` of the run's folder: `tensorboard --logdir OUTPUTS` shows all runs."""

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> Session:  # noqa: ARG002
        """Open the file. Raises InputError if tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("tracker=tensorboard needs the package: pip install 'cluscomp[tensorboard]'") from error
        writer = SummaryWriter(str(folder / "tensorboard"))
        writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")
        return _TensorboardSession(writer)


class _TensorboardSession:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """Points of curves named STAGE/NUMBER."""
        for key, value in numbers.items():
            self.writer.add_scalar(f"{stage}/{key}", value, step or 0)
        self.writer.flush()

    def end(self, summary: dict[str, Any] | None) -> None:  # noqa: ARG002
        """Close the file; scores and sizes of stages are in it as they came."""
        self.writer.close()
