"""What a stage costs and what a machine can do: plain numbers, no tensors."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.kernels.work import Work
from cluscomp.process import cores, ram_for_this_process
from cluscomp.settings import settings
from cluscomp.store.files import new_file

GIB = 2**30
CALIBRATION = "machine.json"  # in the cache: what `cluscomp plan --calibrate` measured on this machine
# Work of a core without a calibration: half of what notes and benchmarks saw on one AVX-512 core.
CORE = {"flops": 70e9, "traffic": 2e9, "read": 0.5e9, "distances": 3e9, "pruned": 8e6, "calls": 2e5}
# Of any card: what one H100 reached on its host (experiments/21-gpu.md).
CARD = {"pruned": 3e8, "calls": 7e4}
ONE_CORE = ("read", "calls")  # what several cores do no faster


@settings
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
        rates = {name: rate * (1 if name in ONE_CORE else cores()) for name, rate in CORE.items()}
        rates, calibrated = _measured(cache, rates)
    else:
        tflops, bandwidth = machine.tflops or 50.0, machine.bandwidth or 500.0
        # brute-force search pads a centroid to 32 numbers and compares: a fifth of the matrix rate, over 64 a distance
        rates |= {"flops": tflops * 1e12, "traffic": bandwidth * 1e9, "distances": tflops * 1e12 / 320} | CARD
        vram = _vram() if machine.vram is None else machine.vram * GIB
    return Limits(ram, vram, rates, calibrated)


def write_calibration(cache: Path, rates: dict[str, float]) -> Path:
    """Keep measured rates of this machine's cores; returns the file."""
    with new_file(cache / CALIBRATION) as unfinished:
        unfinished.write_text(json.dumps({"cores": cores(), "rates": rates}, indent=1) + "\n")
    return cache / CALIBRATION


def _measured(cache: Path, rates: dict[str, float]) -> tuple[dict[str, float], bool]:
    try:
        found = json.loads((cache / CALIBRATION).read_text())
        known, here = {name: float(found["rates"][name]) for name in rates}, found["cores"] == cores()
    except (OSError, ValueError, KeyError, TypeError):
        return rates, False
    return (known, True) if here and min(known.values()) > 0 else (rates, False)


def _vram() -> float:
    import torch

    if not torch.cuda.is_available():
        raise InputError("device=cuda: this machine has no usable GPU; name one to plan for with machine=")
    free, _ = torch.cuda.mem_get_info()
    return float(free + torch.cuda.memory_reserved())
