"""What a stage or an evaluation of a run took."""

import time
from typing import Any

import torch

from cluscomp.process import peak_memory, reset_peak_memory


class Measured:
    """Seconds, CPU seconds and peak memory (bytes) of a `with` block, as a dictionary that fills at its end."""

    def __enter__(self) -> dict[str, Any]:
        reset_peak_memory()
        self.start, self.cpu_start, self.cost = time.monotonic(), time.process_time(), dict[str, Any]()
        return self.cost

    def __exit__(self, *_: object) -> None:
        self.cost |= {
            "seconds": time.monotonic() - self.start,
            "cpu_seconds": time.process_time() - self.cpu_start,
            "peak_ram": peak_memory(),
        }
        if torch.cuda.is_available():
            self.cost["peak_vram"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
