"""trackio as a mirror of the progress lines and of the record."""

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluscomp.errors import InputError
from cluscomp.runs.trackers import Session
from cluscomp.settings import settings

log = logging.getLogger("cluscomp")


@settings
class TrackioTracker:
    """trackio, in its own data base on this machine: `trackio show --project cluscomp` shows it.

    A sweep is a group. A run that goes on after it was killed goes on there, too. Where things go is decided by
    trackio's own variables: TRACKIO_DIR (the data base's folder), TRACKIO_SPACE_ID and TRACKIO_SERVER_URL (a server).
    """

    project: str

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> Session:  # noqa: ARG002
        """Start the run. Raises InputError if trackio is not installed."""
        try:
            import trackio
        except ImportError as error:
            raise InputError("tracker=trackio needs the package: pip install 'cluscomp[trackio]'") from error
        with redirect_stdout(io.StringIO()):  # what it prints would stand among results
            run = trackio.init(
                self.project, name=name, group=config.get("name"), config=config, resume="allow", embed=False
            )
        log.info("trackio  project %s, run %s; `trackio show --project %s`", self.project, name, self.project)
        return _TrackioSession(run)


class _TrackioSession:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """Points of metrics named STAGE/NUMBER; without a step after all points so far."""
        self.run.log({f"{stage}/{key}": value for key, value in numbers.items()}, step=step)

    def end(self, summary: dict[str, Any] | None, files: dict[str, str]) -> None:
        """Store scores and sizes as metrics and files as an artifact, and close the run; without a summary as failed.

        trackio has no state of a run: one that failed has an alert.
        """
        import trackio

        with redirect_stdout(io.StringIO()), TemporaryDirectory() as folder:
            if summary is None:
                self.run.alert("the run failed", level=trackio.AlertLevel.ERROR)
            else:
                self.run.log({key: value for key, value in summary.items() if isinstance(value, int | float)})
            if files:
                artifact = trackio.Artifact(self.run.name, "record")
                for name, text in files.items():
                    (path := Path(folder) / name).write_text(text, encoding="utf-8")
                    artifact.add_file(path)
                self.run.log_artifact(artifact)
            trackio.finish()  # the run, which is the only one; its own method would say so once more at the end
