"""W&B offline, read back by wandb's own inspector; progress lines; peak memory against an allocation of known size."""

import json
import logging
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from cluscomp.tracking import NoTracker, Progress, WandbTracker, peak_memory, reset_peak_memory

TRACK = """
import sys
from pathlib import Path
from cluscomp.tracking import WandbTracker
tracker = WandbTracker(project="tests", entity=None, mode="offline")
tracker.begin("run-1", {"seed": 3, "method": {"bits": 2.5}}, Path(sys.argv[1]))
tracker.log("cluster", {"relative_error": 0.25, "seconds": 1.5})
tracker.log("evaluate cluster", {"perplexity": 12.5})
tracker.end({"cluster/perplexity": 12.5, "linear_bits_per_weight": 2.5})
"""


def inspect(folder: Path, *options: str) -> str:
    """What `wandb leet inspect` finds in the one offline run below a folder."""
    (run,) = folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_wandb_offline_holds_config_stages_and_summary(tmp_path):
    pytest.importorskip("wandb")
    done = subprocess.run([sys.executable, "-c", TRACK, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(inspect(tmp_path, "--summary"))
    summary = found["summary"]
    assert summary["cluster/perplexity"] == 12.5 and summary["linear_bits_per_weight"] == 2.5
    assert "2.5" in json.dumps(found["config"]) and "seed" in json.dumps(found["config"])
    history = inspect(tmp_path)
    assert "cluster/relative_error" in history and "evaluate cluster/perplexity" in history


def test_a_run_that_fails_is_not_marked_as_finished(tmp_path):
    """Without end() W&B must see the failure: the exit code in its summary is not 0."""
    pytest.importorskip("wandb")
    failing = TRACK.replace("tracker.end(", "sys.exit(1)\ntracker.end(")
    subprocess.run([sys.executable, "-c", failing, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    found = json.loads(inspect(tmp_path, "--summary"))
    assert found["exit_code"] == 1


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="mode"):
        WandbTracker(project="tests", entity=None, mode="sometimes")


def test_no_tracker_writes_nothing(tmp_path):
    tracker = NoTracker()
    tracker.begin("run-1", {}, tmp_path)
    tracker.log("cluster", {"relative_error": 0.25})
    tracker.end({"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_progress_lines_count_blocks_and_say_what_is_left(caplog):
    caplog.set_level(logging.INFO, "cluscomp")
    progress = Progress("cluster", 12)
    progress.skip(10)
    progress.step("relative error 0.5000")
    progress.start -= 90  # as if the step had taken a minute and a half
    progress.step("relative error 0.2500")
    skipped, first, second = (record.getMessage() for record in caplog.records)
    assert skipped == "cluster  10 of 12 blocks were done before"
    assert first.startswith("cluster  block 11/12  relative error 0.5000    0.0 s  ")
    assert first.endswith("GiB  0:00 left")
    assert second.startswith("cluster  block 12/12  relative error 0.2500") and second.endswith("0:00 left")


def test_progress_estimates_from_this_run_alone(caplog):
    caplog.set_level(logging.INFO, "cluscomp")
    progress = Progress("cluster", 14)
    progress.skip(10)
    progress.start -= 90
    progress.step("x")
    assert caplog.records[-1].getMessage().endswith("4:30 left")  # three more at 90 s, whatever the skipped ten took


def test_peak_memory_sees_an_allocation_and_forgets_it():
    reset_peak_memory()
    before = peak_memory()
    with mmap.mmap(-1, 200 << 20) as block:  # fresh pages: an allocator might reuse what it holds
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        after = peak_memory()
    assert 190 << 20 < after - before < 260 << 20
    reset_peak_memory()
    assert peak_memory() < after - (100 << 20)
