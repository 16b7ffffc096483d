"""The process: memory, cores, its number among several, Ctrl-C, progress lines."""

import contextlib
import ctypes
import gc
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

log = logging.getLogger("cluscomp")
Thing = TypeVar("Thing")
SILENCE = 60.0  # seconds after which a log gets a sign of life
BURST = 3.0  # seconds within which Ctrl-C pressed again is the same Ctrl-C
INTERRUPTED = "interrupted; finished blocks are kept, the same command goes on from there"
LATER = 0.01  # seconds until one that came where an exception would be lost comes again
_signals: int | None = None  # what signals have come can be read there
_pressed = False
MMAP_THRESHOLD = -3, 2 * 2**20  # of malloc.h; bytes of the smallest piece that goes back to the system when it is freed


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While modules are loaded there is nothing to clean up: Ctrl-C ends the process at once, with one line.

    A module that is missing is told in a line, too, with the folders of the search path that this user may not read.
    """
    handler = signal.getsignal(signal.SIGINT)
    mind = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if mind:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    except ImportError as error:
        sys.exit(f"cluscomp: failed: {error}{unreadable()}")
    finally:
        if mind:
            signal.signal(signal.SIGINT, handler)


def _leave(*_: object) -> None:
    os.write(2, b"cluscomp: interrupted\n")
    os._exit(130)


def interrupt_once() -> None:
    """Let Ctrl-C interrupt what is at work, and again within BURST seconds not what then cleans up."""
    last = -BURST

    def interrupt(number: int, frame: Any) -> None:
        nonlocal last
        if _lends_memory(frame):
            threading.Timer(LATER, os.kill, (os.getpid(), number)).start()
            return
        before, last = last, time.monotonic()
        if last - before >= BURST:
            signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else who started this wants it ignored
        signal.signal(signal.SIGINT, interrupt)
        global _signals
        _signals, write = os.pipe()
        os.set_blocking(_signals, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)


def pressed() -> bool:
    """Whether Ctrl-C has come, also where Python could not act on it, as a library waits for another process."""
    global _pressed  # noqa: PLW0603
    if _signals is not None and not _pressed:
        with contextlib.suppress(BlockingIOError):
            _pressed = signal.SIGINT in os.read(_signals, 1024)
    return _pressed


def _lends_memory(frame: Any) -> bool:
    """Whether a tensor is being handed to a compiled kernel, which takes an exception there for one of another kind."""
    while frame is not None and frame.f_code.co_name != "__dlpack__":
        frame = frame.f_back
    return frame is not None


def unreadable() -> str:
    """The end of a sentence on a missing module: folders where modules are looked for and this user may not read."""
    found = []
    for place in filter(None, sys.path):
        try:
            Path(place).stat()
            if not os.access(place, os.R_OK | os.X_OK):
                found.append(place)
        except PermissionError:
            found.append(place)
        except OSError:
            continue
    return f"; this user may not read {', '.join(found)}, where modules are looked for" if found else ""


def cores() -> int:
    """Processor cores that this process may use, at most 64."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 64)


def resident() -> float:
    """Bytes of RAM this process has now (Linux; elsewhere 0.5 GiB, what the libraries take)."""
    fields = _kilobytes("/proc/self/status")
    return fields.get("VmRSS", 2.0**29)


def hoard_nothing() -> None:
    """Before torch is loaded: large tensors are mapped one by one, in huge pages, and unmapped when they are freed.

    By itself glibc keeps pieces of up to 32 MiB, which in training is more than all that is alive: 3.0 GB in the place
    of 1.2 (stage finetune, SmolLM2-135M, 8 x 256 tokens). Huge pages make mapping cheap.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(*MMAP_THRESHOLD)


def give_memory_back() -> None:
    """Give the system what was freed: glibc keeps it, which would count as ours, and more with every block."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def ram_for_this_process() -> float:
    """Bytes of RAM this process may have in all: what it has and what is free, or less in a container.

    Of what is free, and of a container's limit, the processes of one run on this machine have equal shares.
    """
    fields, here = _kilobytes("/proc/meminfo"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    most = fields["MemAvailable"] / here + resident() if "MemAvailable" in fields else math.inf
    with contextlib.suppress(OSError, ValueError):  # no such limit
        most = min(most, float(Path("/sys/fs/cgroup/memory.max").read_text()) / here)
    return most


def _kilobytes(path: str) -> dict[str, float]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs: Any = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {key: float(value.split()[0]) * 1024 for key, value in pairs}


def for_tracker(stage: str, numbers: dict[str, float], step: int) -> dict[str, Any]:
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
            "%s  block %*d/%d  %s  %5.1f s  %.2f GiB  %s",
            self.stage, len(str(self.total)), self.done, self.total, text, seconds, peak / 2**30,
            time_left(left), extra=for_tracker(f"{self.stage} blocks", numbers, self.done),
        )  # fmt: skip
        self.last = now


def told(things: Iterable[Thing], total: int, label: str, unit: str) -> Iterator[Thing]:
    """The things one by one, with a bar on a terminal that is gone at the end; elsewhere a line for each SILENCE.

    Both say how many are done and how long the others will take.
    """
    if sys.stderr.isatty():
        yield from tqdm(things, label, total, leave=False, unit=unit)
        return
    start = last = time.monotonic()
    for number, thing in enumerate(things):
        if (now := time.monotonic()) - last >= SILENCE:
            left = (now - start) / number * (total - number) if number else math.nan
            log.info("%s  %s %d/%d  %s", label, unit, number, total, time_left(left))
            last = now
        yield thing


def time_left(seconds: float) -> str:
    """Seconds as `minutes:seconds left`; nothing for a time that is not known."""
    return "" if math.isnan(seconds) else "{}:{:02d} left".format(*divmod(round(seconds), 60))


def peak_memory() -> int:
    """Most resident memory of this process since `reset_peak_memory`, in bytes (Linux; elsewhere since its start)."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

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


def join_slurm() -> None:
    """Let the tasks of `srun` be the processes of one run: what torchrun sets, from what Slurm says of this task."""
    said = os.environ.get
    if "RANK" in os.environ or int(said("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    here = re.match(r"(\d+)", said("SLURM_STEP_TASKS_PER_NODE", "1"))
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", said("SLURM_STEP_NODELIST", "localhost"))  # of node[01-04,07]: node01
    assert here and first, "Slurm names tasks and nodes so"
    port = 20_000 + (int(said("SLURM_JOB_ID", "0")) * 31 + int(said("SLURM_STEP_ID", "0"))) % 20_000
    os.environ.update(
        RANK=said("SLURM_PROCID", "0"), WORLD_SIZE=said("SLURM_STEP_NUM_TASKS", "1"),
        LOCAL_RANK=said("SLURM_LOCALID", "0"), LOCAL_WORLD_SIZE=here[1],
        MASTER_ADDR=first[1] + (first[2] or ""), MASTER_PORT=said("MASTER_PORT", str(port)),
    )  # fmt: skip


def processes() -> int:
    """How many processes work on this run together (torchrun, srun); 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))
