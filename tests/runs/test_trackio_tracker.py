"""trackio, read back from its own data base; skipped where it is not installed."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
from pipelines import pipeline, small_run

from cluscomp.errors import InputError
from cluscomp.runs.trackers import Forgiving
from cluscomp.runs.trackio_tracker import TrackioTracker
from cluscomp.store.records import read

TRACKER = TrackioTracker(project="tests")


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    """The package, with its data base in a folder of these tests: it reads the variable when it is imported."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    try:
        yield pytest.importorskip("trackio")
    finally:
        del os.environ["TRACKIO_DIR"]


def points_of(trackio, project, name):
    """The rows that a run logged."""
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(project, name)


def test_without_the_package_the_pip_line_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"cluscomp\[trackio\]"):
        TRACKER.begin("run-1", {}, tmp_path / "run-1")


def test_trackio_holds_what_the_record_holds(trackio, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, "cluscomp")
    settings = small_run(tmp_path)
    path = pipeline(*settings, "evaluate.limit=2", "tracker=trackio").path
    record, (run,) = read(path), trackio.Api().runs("cluscomp")
    assert run.name == record.run["name"] and run.config["choices"]["method"] == "rtn" and not run.alerts()
    assert "trackio" not in capsys.readouterr().out.lower()
    points = points_of(trackio, "cluscomp", run.name)
    for row in record.scores:
        assert [p[key] for p in points if (key := f"{row.after}/{row.dataset}/{row.metric}") in p] == [row.value]
    assert [p["step"] for p in points if "cluster_blocks/relative_error" in p] == [1, 2, 3]
    trackio.init("cluscomp", name="reader", embed=False)
    kept = Path(trackio.use_artifact(f"{run.name}:latest").download(tmp_path / "kept"))
    trackio.finish()
    assert json.loads((kept / "record.json").read_text()) == json.loads(path.read_text())


def test_a_run_that_goes_on_is_the_same_run_and_one_that_fails_has_an_alert(trackio, tmp_path):
    for value in (0.25, 0.5):
        session = Forgiving(TRACKER, "run-1", {"name": "sweep"}, tmp_path / "run-1")
        session.log("cluster", {"relative_error": value})
        session.end(None, {})
    (run,) = trackio.Api().runs("tests")
    assert run.config["_Group"] == "sweep" and [one["level"] for one in run.alerts()] == ["error", "error"]
    points = points_of(trackio, "tests", "run-1")
    assert [(p["step"], p["cluster/relative_error"]) for p in points] == [(0, 0.25), (1, 0.5)]
    assert not (tmp_path / "run-1").exists()
