"""Where numbers go while a run works: progress lines, and W&B, TensorBoard, ... as mirrors of them and the record.

Decides nothing. What a stage says of a block or a step goes through its progress lines, which carry numbers
(`for_tracker`).
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.settings import settings

log = logging.getLogger("cluscomp")
MODES = ("auto", "online", "offline", "disabled")
TAGS = ("method", "model", "data")  # groups whose choices W&B has as tags


class Session(Protocol):
    """A place that receives what the record of one run receives."""

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """A stage ended with these numbers; or so far it came, in blocks or optimiser steps."""
        ...

    def end(self, summary: dict[str, Any] | None, files: dict[str, str]) -> None:
        """The run ended; `summary` holds scores and size, flat (None: it failed), `files` texts by name to keep."""
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

    def end(self, summary: dict[str, Any] | None, files: dict[str, str]) -> None:
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
            self.session.log(stage.replace(" ", "_"), numbers, step)

    def end(self, summary: dict[str, Any] | None, files: dict[str, str]) -> None:
        """The run ended."""
        with self._warned():
            self.session.end(summary, files)

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
    def __init__(self, take: Callable[..., None]) -> None:
        super().__init__()
        self.take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on the numbers that a line carries."""
        if hasattr(record, "numbers"):
            self.take(*record.numbers)


@contextmanager
def listening(take: Callable[..., None]) -> Iterator[None]:
    """Hand the numbers in all progress lines to `take`, as `Session.log` has them."""
    listener = _Listener(take)
    log.addHandler(listener)
    try:
        yield
    finally:
        log.removeHandler(listener)


@settings
class NoTracker:
    """Track nothing: the record is enough."""

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> Session:  # noqa: ARG002
        """Nothing to do."""
        return Nowhere()


@settings
class WandbTracker:
    """Weights & Biases. "offline" needs no key and no network; `wandb sync` uploads later. "auto" is online with a key.

    The record and its tables are an artifact of the run.

    The server is waited for at most `timeout` seconds, at the beginning and at the end. Online a run that goes on after
    it was killed goes on there, too. W&B does not learn the command line, which its own metadata would hold. Its own
    variables win over these settings: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE (disabled, too), WANDB_RUN_ID (which
    `wandb agent` gives; else the run's name), WANDB_RUN_GROUP (else the sweep's name), WANDB_JOB_TYPE (else the last
    stage), WANDB_TAGS (else the choices of method, model and data).
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
        own = {key: value for key, value in os.environ.items() if key.startswith("WANDB_") and value}
        said = {key.removeprefix("WANDB_").lower(): value for key, value in own.items()}
        mode: Any = said.get("mode", self.mode)
        if mode not in MODES:
            raise InputError(f"WANDB_MODE={mode} in the environment: {', '.join(MODES)}")
        if mode == "auto":
            mode = "online" if _has_key() else "offline"
        choices = config.get("choices", {})
        quiet = wandb.Settings(
            init_timeout=self.timeout, finish_timeout=self.timeout, silent=True, disable_git=True, x_disable_meta=True
        )
        run = wandb.init(
            project=said.get("project", self.project), entity=said.get("entity", self.entity), mode=mode, name=name,
            id=said.get("run_id", name), group=said.get("run_group", config.get("name")),
            job_type=said.get("job_type", _last(config)),
            tags=said["tags"].split(",") if "tags" in said else [choices[one] for one in TAGS if one in choices],
            config=config, dir=str(folder), resume="allow" if mode == "online" else None, settings=quiet,
        )  # fmt: skip
        log.info("W&B  %s, %s%s", mode, folder / "wandb", "; `wandb sync` uploads it" if mode == "offline" else "")
        return _WandbSession(run)


class _WandbSession:
    def __init__(self, run: Any) -> None:
        self.run = run
        self.stepping: set[str] = set()

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """One line of the run's history, each number named STAGE/NUMBER; what has steps is drawn over them."""
        if step is not None:
            numbers = numbers | {"step": step}
            if stage not in self.stepping:
                self.stepping.add(stage)
                self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/{key}": value for key, value in numbers.items()})

    def end(self, summary: dict[str, Any] | None, files: dict[str, str]) -> None:
        """Store the summary and the files and close the run; without a summary as failed."""
        import wandb

        if files:
            artifact = wandb.Artifact(self.run.name, "record")
            for name, text in files.items():
                with artifact.new_file(name, encoding="utf-8") as file:
                    file.write(text)
            self.run.log_artifact(artifact)
        if summary is not None:
            self.run.summary.update(summary)
        self.run.finish(exit_code=int(summary is None))


def _last(config: dict[str, Any]) -> str:
    """What a run is for: its last stage, or evaluate where nothing is made."""
    return str((config.get("order") or ["evaluate"])[-1])


def _has_key() -> bool:
    """Whether there is a key for W&B, which its server takes."""
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception as error:
        log.warning("W&B  cannot be reached with this key: %s", " ".join(str(error).split()))
        return False


@settings
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

    def end(self, summary: dict[str, Any] | None, files: dict[str, str]) -> None:  # noqa: ARG002
        """Close the file; scores and sizes of stages are in it as they came, and tables as text."""
        for name, text in files.items():
            if name.endswith(".md"):
                self.writer.add_text(name, text)
        self.writer.close()
