"""What a stage costs and what a machine can do: plain numbers, no tensors."""

import contextlib
import ctypes
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from cluscomp.errors import InputError

GIB = 2**30
CALIBRATION = "machine.json"  # in the cache: what `cluscomp plan --calibrate` measured on this machine
# Work of a core without a calibration: half of what notes and benchmarks saw on one AVX-512 core.
CORE = {"flops": 70e9, "traffic": 2e9, "read": 0.5e9, "distances": 3e9, "pruned": 8e6}


@dataclass(frozen=True)
class Work:
    """Amounts of work.

    `flops` of matrix products, bytes of `traffic` of all else, bytes `read` from files, `distances` of searches for the
    nearest centroid without an index, `pruned` point-iterations of K-means, counted at D = 4.
    """

    flops: float = 0
    traffic: float = 0
    read: float = 0
    distances: float = 0
    pruned: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in CORE))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, name) * times for name in CORE))


@dataclass(frozen=True)
class Cost:
    """What a stage needs at its worst moment, in bytes by part, and its work.

    `device`: where the model computes (GPU memory, or RAM without a GPU); `host`: RAM in any case. Both are beside the
    process and its libraries. `relief` names settings that make it smaller.
    """

    device: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    relief: str = ""


def worst(*moments: dict[str, float]) -> dict[str, float]:
    """The moment with the largest sum."""
    return max(moments, key=lambda parts: sum(parts.values()))


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Machine:
    """A machine that runs are planned for; null: what this machine has (conf/machine/this.yaml).

    `ram` and `vram` in GiB; `tflops` of 16-bit matrix products as reached, not as printed on the box; `bandwidth` of
    the accelerator's memory in GB/s as reached. `ram`, too, is this machine's if null.
    """

    name: str
    ram: float | None = Field(gt=0)
    vram: float | None = Field(gt=0)
    tflops: float | None = Field(gt=0)
    bandwidth: float | None = Field(gt=0)

    @property
    def here(self) -> bool:
        """Whether this is the machine the process runs on."""
        return self.vram is None


@dataclass(frozen=True)
class Limits:
    """Bytes of RAM and of accelerator memory (None without one) that a process may take, and work per second."""

    ram: float
    vram: float | None
    rates: dict[str, float]
    calibrated: bool

    def seconds(self, work: Work) -> float:
        """Wall time of some work, its kinds one after the other."""
        return float(sum(getattr(work, name) / rate for name, rate in self.rates.items()))


def limits(machine: Machine, device: str, cache: Path) -> Limits:
    """What a machine can do on `device` (cpu or cuda); of this machine, as `calibrate` measured it if it did."""
    ram = ram_for_this_process() if machine.ram is None else machine.ram * GIB
    vram, rates, calibrated = None, dict(CORE), False
    if device == "cpu":
        cores = _cores()
        rates = {name: rate * (1 if name == "read" else cores) for name, rate in CORE.items()}
        rates, calibrated = _measured(cache, rates)
    else:
        tflops, bandwidth = machine.tflops or 50.0, machine.bandwidth or 500.0
        # brute-force search pads a centroid to 32 numbers and compares: a fifth of the matrix rate, over 64 a distance
        rates |= {"flops": tflops * 1e12, "traffic": bandwidth * 1e9, "distances": tflops * 1e12 / 320, "pruned": 2e8}
        vram = _vram() if machine.vram is None else machine.vram * GIB
    return Limits(ram, vram, rates, calibrated)


def write_calibration(cache: Path, rates: dict[str, float]) -> Path:
    """Keep measured rates of this machine's cores; returns the file."""
    path = cache / CALIBRATION
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cores": _cores(), "rates": rates}, indent=1) + "\n")
    return path


def _measured(cache: Path, rates: dict[str, float]) -> tuple[dict[str, float], bool]:
    try:
        found = json.loads((cache / CALIBRATION).read_text())
        known = {name: float(found["rates"][name]) for name in rates}
    except (OSError, ValueError, KeyError, TypeError):
        return rates, False
    return (known, True) if found["cores"] == _cores() and all(known.values()) else (rates, False)


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 64)


def _vram() -> float:
    import torch

    if not torch.cuda.is_available():
        raise InputError("device=cuda: this machine has no usable GPU; name one to plan for with machine=")
    free, _ = torch.cuda.mem_get_info()
    return float(free + torch.cuda.memory_reserved())


def resident() -> float:
    """Bytes of RAM this process has now (Linux; elsewhere 0.5 GiB, what the libraries take)."""
    fields = _kilobytes("/proc/self/status")
    return fields.get("VmRSS", 2.0**29)


def give_memory_back() -> None:
    """Give the system what was freed: glibc keeps it, which would count as ours, and more with every block."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def ram_for_this_process() -> float:
    """Bytes of RAM this process may have in all: what it has and what is free, or less in a container."""
    fields = _kilobytes("/proc/meminfo")
    most = fields["MemAvailable"] + resident() if "MemAvailable" in fields else math.inf
    with contextlib.suppress(OSError, ValueError):  # no such limit
        most = min(most, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return most


def _kilobytes(path: str) -> dict[str, float]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs: Any = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {key: float(value.split()[0]) * 1024 for key, value in pairs}
