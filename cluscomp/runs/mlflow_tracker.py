"""MLflow as a mirror of the progress lines and of the record."""

import logging
import os
from pathlib import Path
from typing import Any

from cluscomp.errors import InputError
from cluscomp.runs.trackers import Session
from cluscomp.settings import settings

log = logging.getLogger("cluscomp")


@settings
class MlflowTracker:
    """MLflow, in a data base beside the runs or on a server.

    `mlflow ui --backend-store-uri sqlite:///OUTPUTS/mlflow.db` shows the data base.
    MLflow's own variables win over these settings: MLFLOW_TRACKING_URI (a server's address) and MLFLOW_EXPERIMENT_NAME.
    """

    uri: str | None  # null: the data base
    experiment: str

    def begin(self, name: str, config: dict[str, Any], folder: Path) -> Session:
        """Start the run, its settings as a file. Raises InputError if mlflow is not installed."""
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise InputError("tracker=mlflow needs the package: pip install 'cluscomp[mlflow]'") from error
        place = folder.resolve().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.uri
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.experiment
        client = MlflowClient(uri or f"sqlite:///{place / 'mlflow.db'}")
        found = client.get_experiment_by_name(title)
        files = None if uri else (place / "mlflow").as_uri()
        number = found.experiment_id if found else client.create_experiment(title, artifact_location=files)
        tags = {key: str(value) for key, value in config.get("choices", {}).items()}
        tags |= {key: str(config[key]) for key in ("name", "commit") if key in config}
        run = client.create_run(number, run_name=name, tags=tags).info.run_id
        client.log_dict(run, config, "config.json")
        log.info("MLflow  experiment %s, run %s", title, name)
        return _MlflowSession(client, run)


class _MlflowSession:
    def __init__(self, client: Any, run: str) -> None:
        self.client, self.run = client, run

    def log(self, stage: str, numbers: dict[str, Any], step: int | None = None) -> None:
        """Points of metrics named STAGE/NUMBER."""
        for key, value in numbers.items():
            self.client.log_metric(self.run, f"{stage}/{key}", float(value), step=step or 0)

    def end(self, summary: dict[str, Any] | None, files: dict[str, str]) -> None:
        """Store scores, sizes and files, and close the run; without a summary as failed."""
        for key, value in (summary or {}).items():
            if isinstance(value, int | float):
                self.client.log_metric(self.run, key, float(value))
        for name, text in files.items():
            self.client.log_text(self.run, text, name)
        self.client.set_terminated(self.run, "FAILED" if summary is None else "FINISHED")
