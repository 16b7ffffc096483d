"""A process that is interrupted while it starts or cleans up, and one whose modules cannot be read."""

import logging
import os
import platform
import subprocess
import sys
import time

import pytest

from cluscomp import process

STARTING = """
import os, signal
from cluscomp.process import loading
with loading():
    for _ in range(5):
        os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""
CLEANING_UP = """
import os, signal
from cluscomp import process
process.interrupt_once()
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("not interrupted")
except KeyboardInterrupt:
    for _ in range(4):
        os.kill(os.getpid(), signal.SIGINT)
    print("cleaned up")
process.BURST = 0.0
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted later")
"""
LENDING = """
import os, signal, time
import torch
from cluscomp import process
from cluscomp.kernels.loading import native

class Lent:
    def __init__(self, tensor):
        self.tensor = tensor
    def __dlpack__(self, **asked):
        os.kill(os.getpid(), signal.SIGINT)
        return self.tensor.__dlpack__(**asked)
    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

process.interrupt_once()
try:
    points, codes, distances = torch.zeros(8, 2), torch.zeros(8, dtype=torch.int32), torch.zeros(8)
    if native is not None:
        native.assign(Lent(points), torch.zeros(2, 2), codes, distances, 1)
    else:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted after the kernel")
"""
MISSING = """
import os, sys
from cluscomp.process import loading
os.mkdir(sys.argv[1], 0o000)
sys.path.append(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
with loading():
    import no_such_module
"""


def left(script: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script that loads next to nothing."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_while_modules_are_loaded_is_one_line():
    assert left(STARTING) == (130, "", "cluscomp: interrupted\n")


def test_ctrl_c_pressed_again_does_not_interrupt_the_cleaning_up():
    assert left(CLEANING_UP) == (0, "cleaned up\ninterrupted later\n", "")


def test_ctrl_c_while_a_tensor_is_handed_to_a_kernel_is_not_lost(forks):
    """The kernels' binding takes an exception of `__dlpack__` for an argument of another kind, and forgets it."""
    done = forks.run(script=LENDING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted after the kernel\n", "")


def test_a_missing_module_is_named_with_the_folders_that_cannot_be_read(tmp_path):
    code, out, told = left(MISSING, str(tmp_path / "site-packages"))
    assert code == 1 and out == "" and told.count("\n") == 1
    assert "no_such_module" in told and "may not read" in told and str(tmp_path / "site-packages") in told


def test_processes_of_a_run_share_what_is_free_and_keep_what_they_have(monkeypatch):
    """Each has 2 MiB already, which are no longer free."""
    told = {"/proc/meminfo": {"MemAvailable": 8.0 * 2**20}, "/proc/self/status": {"VmRSS": 2.0 * 2**20}}
    monkeypatch.setattr(process, "_kilobytes", told.__getitem__)
    for count, mebibytes in ((1, 10), (4, 4)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        assert process.ram_for_this_process() == mebibytes * 2**20


def test_a_log_gets_a_sign_of_life_with_the_time_left(monkeypatch, caplog):
    """Each thing takes 50 seconds here; a line comes when a minute has passed."""
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        assert list(process.told("abcde", 5, "steps", "step")) == list("abcde")
    assert [record.getMessage() for record in caplog.records] == [
        "steps  step 1/5  6:40 left", "steps  step 3/5  2:13 left"
    ]  # fmt: skip
    assert process.time_left(float("nan")) == "" and process.time_left(61.2) == "1:01 left"


FREED = """
import sys
import torch
from cluscomp.process import hoard_nothing, resident
if sys.argv[1:] == ["told"]:
    hoard_nothing()
torch.ones(2**22)  # 16 MiB: once it is freed, glibc by itself keeps pieces up to this size
before = resident()
pieces = [torch.ones(2**20) for _ in range(33)]  # 4 MiB each
del pieces[:-1]  # not the last: glibc gives back the end of its heap alone, and this piece, which stays, lies there
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps other pieces")
def test_large_pieces_go_back_to_the_system_when_they_are_freed(without_ours):
    told, untold = (float(without_ours.run(*said, script=FREED).stdout) for said in (["told"], []))
    assert told < 2**24 < 2**26 < untold


def test_the_tasks_of_srun_are_the_processes_of_one_run(monkeypatch):
    """What Slurm sets for the fifth of six tasks; a job of one task, and what torchrun set, stay as they are."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)
    slurm = {
        "STEP_NUM_TASKS": "6", "PROCID": "4", "LOCALID": "1", "STEP_TASKS_PER_NODE": "3(x2)", "JOB_ID": "17",
        "STEP_ID": "2", "STEP_NODELIST": "gpu[07-08],old3",
    }  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    process.join_slurm()
    assert [os.environ[name] for name in names] == ["4", "6", "1", "3", "gpu07", str(20_000 + 17 * 31 + 2)]
    monkeypatch.setenv("RANK", "0")
    process.join_slurm()
    assert process.rank() == 0
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    process.join_slurm()
    assert process.rank() == 0 and "RANK" not in os.environ
