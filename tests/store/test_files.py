"""Locks of folders between processes that say they are on other machines: alive, killed, and stopped for a while."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import SoftFileLease

from cluscomp.store import files

LEASE = 3.0
WORK = """
import signal, socket, sys, time
from pathlib import Path
from cluscomp.store import files

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have been told to ignore it
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
files.LEASE = float(sys.argv[4])
socket.gethostname = lambda: name
with files.held_alone(folder, name):
    (folder / f"{name} entered").touch()
    time.sleep(seconds)
    (folder / f"{name} worked").touch()
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that says it is on the machine `name` and works for some seconds in tmp_path."""
    begun = []

    def run(name: str, seconds: float, lease: float = LEASE) -> subprocess.Popen:
        command = [sys.executable, "-c", WORK, str(tmp_path), name, str(seconds), str(lease)]
        begun.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def until_there(path: Path, seconds: float = 60) -> float:
    """When the file came, on the clock of this process."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.01)
    return time.monotonic()


def kill(process: subprocess.Popen) -> float:
    process.kill()
    process.wait()
    return time.monotonic()


def test_a_living_holder_on_another_machine_is_waited_for_beyond_the_lease(start, tmp_path):
    first = start("one", 1.5 * LEASE)
    began = until_there(tmp_path / "one entered")
    second = start("two", 0)
    entered = until_there(tmp_path / "two entered")
    assert entered - began >= 1.5 * LEASE and (tmp_path / "one worked").exists()
    assert first.wait() == second.wait() == 0 and not (tmp_path / "lock").exists()


def test_a_holder_killed_on_another_machine_is_followed_after_the_lease(start, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LEASE", LEASE)
    first = start("one", 600)
    until_there(tmp_path / "one entered")
    assert files.is_held(tmp_path)
    second = start("two", 0)
    died = kill(first)
    entered = until_there(tmp_path / "two entered")
    assert entered - died > LEASE / 2  # its last touch is at most a third of the lease old
    assert second.wait() == 0 and not (tmp_path / "lock").exists() and not (tmp_path / "one worked").exists()


def test_nobody_holds_what_was_left_on_another_machine_long_ago(start, tmp_path, monkeypatch):
    first = start("one", 600)
    until_there(tmp_path / "one entered")
    kill(first)
    monkeypatch.setattr(files, "LEASE", LEASE)
    assert files.is_held(tmp_path)
    long_ago = time.time() - 2 * LEASE
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    assert not files.is_held(tmp_path)


def test_a_holder_killed_on_the_same_machine_is_followed_at_once(start, tmp_path):
    first = start("one", 600, lease=3600)
    until_there(tmp_path / "one entered")
    kill(first)
    second = start("one", 0, lease=3600)
    assert second.wait(timeout=60) == 0 and not (tmp_path / "lock").exists()


def test_a_holder_that_was_stopped_and_replaced_is_interrupted_and_leaves_the_other_alone(start, tmp_path):
    first = start("one", 600)
    until_there(tmp_path / "one entered")
    first.send_signal(signal.SIGSTOP)
    second = start("two", LEASE)
    until_there(tmp_path / "two entered")
    first.send_signal(signal.SIGCONT)
    _, told = first.communicate(timeout=60)
    assert first.returncode != 0 and "KeyboardInterrupt" in told and "another process has taken" in told
    assert not (tmp_path / "one worked").exists() and (tmp_path / "lock").exists()
    assert second.wait() == 0 and (tmp_path / "two worked").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from cluscomp.store.files import new_file, written_alone

with written_alone(Path(sys.argv[1])), new_file(Path(sys.argv[1])) as unfinished:
    unfinished.write_text("hal")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_half_written_goes_with_the_next_that_writes_the_file(tmp_path):
    target, other = tmp_path / "record.json", tmp_path / ".other.json-0"
    other.touch()
    assert subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False).returncode == -signal.SIGKILL
    assert [path.read_text() for path in tmp_path.glob(".record.json-*")] == ["hal"] and not target.exists()
    with files.written_alone(target), files.new_file(target) as unfinished:
        unfinished.write_text("whole")
    assert target.read_text() == "whole" and {*tmp_path.iterdir()} == {target, other}


def test_ctrl_c_where_the_library_makes_a_group_of_it_is_a_ctrl_c(start, tmp_path, monkeypatch):
    start("one", 600, lease=files.LEASE)
    until_there(tmp_path / "one entered")

    def pressed(lock):
        raise KeyboardInterrupt

    monkeypatch.setattr(SoftFileLease, "_register_context_descriptor", pressed)  # it has just looked at the lock
    with pytest.raises(KeyboardInterrupt), files.held_alone(tmp_path, "waits"):
        pass


def test_a_folder_takes_the_place_of_what_a_link_leads_to(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old").write_text("old")
    link.symlink_to(real)
    for _ in range(2):
        with files.new_folder(link) as unfinished:
            (unfinished / "new").write_text("new")
        assert link.is_symlink() and [path.name for path in real.iterdir()] == ["new"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    with files.new_folder(dangling) as unfinished:
        (unfinished / "new").write_text("new")
    assert (dangling / "new").read_text() == "new" and len([*tmp_path.iterdir()]) == 4
