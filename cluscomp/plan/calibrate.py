"""A short measurement of what this machine's processor can do, in the units of `cluscomp.kernels.work.Work`."""

import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from cluscomp.kernels.lloyd import BEST, assign, lloyd
from cluscomp.kernels.work import Work

REPEATS = 20


def measure() -> dict[str, float]:
    """Work per second of each kind, some seconds long. Other work on the machine makes it look slower.

    flops: the products of a small block. distances: a search among 256 centroids of 8
    numbers, where brute force is taken. pruned: K-means with 4096 centroids of 4 numbers, as many points as a small
    matrix has. traffic: what a norm and a gate do between products. read: a copy in memory, which is what a file costs
    that was read before. calls: views and sums of eight numbers.
    """
    generator = torch.Generator().manual_seed(0)
    x_TH, w_HI = (torch.randn(*shape, generator=generator) for shape in ((1024, 576), (576, 1536)))
    y_TI = x_TH @ w_HI
    points_ND, few_KD = (torch.randn(*shape, generator=generator) for shape in ((100_000, 8), (256, 8)))
    small_ND = torch.randn(200_000, 4, generator=generator)
    flops = 2.0 * x_TH.numel() * w_HI.shape[1] / _seconds(lambda: x_TH @ w_HI)
    traffic = 10.0 * y_TI.nbytes / _seconds(lambda: _elementwise(y_TI))
    distances = points_ND.shape[0] * few_KD.shape[0] / _seconds(lambda: assign(points_ND, few_KD))
    rounds = 20
    recipe: dict[str, Any] = BEST | {"iterations": rounds, "seed": 0}
    pruned = len(small_ND) * rounds / _seconds(lambda: lloyd(small_ND, 4096, **recipe), repeats=2)
    read = y_TI.nbytes / _seconds(y_TI.clone)
    few_O, many = torch.ones(8), 1000
    calls = 4 * many / _seconds(lambda: [(few_O[1:] + few_O[:-1]).sum() for _ in range(many)])
    return asdict(Work(flops=flops, traffic=traffic, read=read, distances=distances, pruned=pruned, calls=calls))


def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a layer takes in another type on this processor; less than 1 s of work.

    The quickest calls of both in turn, by the time of one thread: what else runs here must not change a run's type.
    """
    x_TI, w_OI = torch.ones(256, 576), torch.ones(1536, 576)
    y_TI, v_OI = x_TI.to(dtype), w_OI.to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = [(_busy(x_TI, w_OI), _busy(y_TI, v_OI)) for _ in range(8)]
    finally:
        torch.set_num_threads(threads)
    return min(other for _, other in pairs[1:]) / min(plain for plain, _ in pairs[1:])


def _busy(x_TI: torch.Tensor, w_OI: torch.Tensor) -> float:
    """Seconds that this thread computes for a product."""
    start = time.thread_time()
    torch.nn.functional.linear(x_TI, w_OI)
    return time.thread_time() - start


def _elementwise(y_TI: torch.Tensor) -> torch.Tensor:
    """Four operations that read and write 10 times the bytes of y in all."""
    squares_TI = y_TI * y_TI  # 2 (the same tensor twice is read once)
    gate_TI = torch.nn.functional.silu(squares_TI)  # 2
    summed_TI = gate_TI + y_TI  # 3
    return summed_TI * squares_TI  # 3


def _seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median wall time of some calls after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)
