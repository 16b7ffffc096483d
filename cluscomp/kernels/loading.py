"""Finds the compiled kernels, or says in one line that there are none."""

import importlib.util
import logging
from types import ModuleType

import torch

log = logging.getLogger(__name__)


def load() -> ModuleType | None:
    """The extension module, or None (said once, in the log) where it was not built."""
    try:
        from cluscomp.kernels import _native  # type: ignore[attr-defined]
    except ImportError as error:
        log.warning("compiled kernels not available (%s); using the slower torch versions", error)
        return None
    return _native  # type: ignore[no-any-return]


native = load()


def number_of_threads(threads: int | None) -> int:
    """`threads` itself, or as many as torch uses.

    Raises:
        ValueError: fewer than 1 or more than 1024 threads.
    """
    if threads is None:
        return min(torch.get_num_threads(), 1024)
    if not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads!r}; it must be a whole number from 1 to 1024")
    return threads


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels serve this tensor: it is on CUDA, and Triton is installed (torch for Linux brings it)."""
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None
