"""MLflow, read back by its own client; skipped where it is not installed."""

import json
import logging
import sys
from pathlib import Path

import pytest
from pipelines import pipeline, small_run

from cluscomp.errors import InputError
from cluscomp.runs.mlflow_tracker import MlflowTracker
from cluscomp.runs.trackers import Forgiving
from cluscomp.store.records import read

TRACKER = MlflowTracker(uri=None, experiment="tests")


def runs_in(folder, experiment="tests"):
    """All runs of an experiment in a folder's data base, and the client."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id]), client


def test_without_the_package_the_pip_line_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"cluscomp\[mlflow\]"):
        TRACKER.begin("run-1", {}, tmp_path / "run-1")


def test_mlflow_holds_what_the_record_holds(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    caplog.set_level(logging.INFO, "cluscomp")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = small_run(tmp_path)
    path = pipeline(*settings, "evaluate.limit=2", "tracker=mlflow").path
    record, ((run,), client) = read(path), runs_in(tmp_path / "outputs", "cluscomp")
    assert run.info.status == "FINISHED" and run.info.run_name == record.run["name"]
    assert run.data.tags["method"] == "rtn" and run.data.tags["model"] == "tiny"
    for row in record.scores:
        assert run.data.metrics[f"{row.after}/{row.dataset}/{row.metric}"] == row.value
    points = client.get_metric_history(run.info.run_id, "cluster_blocks/relative_error")
    assert [point.step for point in points] == [1, 2, 3]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"config.json", "record.json", "tables.md"}
    kept = client.download_artifacts(run.info.run_id, "record.json", str(tmp_path))
    assert json.loads(Path(kept).read_text()) == json.loads(path.read_text())


def test_a_run_that_fails_is_marked_as_failed_and_variables_win(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where MLflow puts the files of such a data base
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    session = Forgiving(TRACKER, "run-1", {"name": "sweep"}, tmp_path / "elsewhere" / "run-1")
    session.log("cluster", {"relative_error": 0.25})
    session.end(None, {})
    (run,), _ = runs_in(tmp_path, "mine")
    assert run.info.status == "FAILED" and run.data.metrics == {"cluster/relative_error": 0.25}
    assert run.data.tags["name"] == "sweep" and not (tmp_path / "elsewhere").exists()
