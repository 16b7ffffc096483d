"""The codebook layer's inner loops beside dense layers and the gather-then-matmul way, in one run.

    python benchmarks/codebook_linear.py [--size 4096] [--threads 1] [--repeats 7] [--output FILE]

Times are process CPU milliseconds (medians of paired rounds: every contender once per round, in turn).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cluscomp.kernels import codebook
from cluscomp.kernels.codes import pack


def paired(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median CPU and wall milliseconds of each contender over `repeats` rounds, after one round to warm up."""
    cpu, wall = {name: [] for name in contenders}, {name: [] for name in contenders}
    for r in range(repeats + 1):
        for name, call in contenders.items():
            c, w = time.process_time(), time.perf_counter()
            call()
            if r > 0:
                cpu[name].append(1000 * (time.process_time() - c))
                wall[name].append(1000 * (time.perf_counter() - w))
    return {
        name: {"cpu_ms": statistics.median(cpu[name]), "wall_ms": statistics.median(wall[name])} for name in contenders
    }


def measure(size: int, K: int, D: int, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    g = torch.Generator().manual_seed(0)
    bits = (K - 1).bit_length()
    codes = torch.randint(0, K, (size, size // D), generator=g, dtype=torch.int32)  # random codes: the worst case
    centroids_KD = torch.randn(K, D, generator=g)
    packed = pack(codes.flatten(), bits)
    x_BI = torch.randn(1, size, generator=g)
    weight_IO = codebook.decode(packed, bits, centroids_KD, size, size)
    dense32, dense16 = weight_IO.t().contiguous(), weight_IO.t().contiguous().bfloat16()
    grad_IO = torch.randn(size, size, generator=g)
    half_KD, out_IO = centroids_KD.half(), torch.empty(size, size)
    long_codes = codes.long().flatten()
    contenders = {
        "gather, then matmul (torch)": lambda: x_BI @ torch.nn.functional.embedding(codes, centroids_KD).view(size, -1),
        "dense float32 (torch)": lambda: torch.nn.functional.linear(x_BI, dense32),
        "dense bfloat16 (torch)": lambda: torch.nn.functional.linear(x_BI.bfloat16(), dense16),
        "multiply": lambda: codebook.multiply(x_BI, packed, bits, centroids_KD, size, threads=threads),
        "multiply, float16 codebook": lambda: codebook.multiply(x_BI, packed, bits, half_KD, size, threads=threads),
        "decode (into memory at hand)": lambda: codebook.decode(
            packed, bits, centroids_KD, size, size, out=out_IO, threads=threads
        ),
        "index_add_ (torch)": lambda: torch.zeros(K, D).index_add_(0, long_codes, grad_IO.view(-1, D)),
        "gradient": lambda: codebook.gradient(grad_IO, packed, bits, K, D, threads=threads),
    }
    if K <= 256:
        packed_in = pack(codes.t().flatten(), 8)  # the same codes as (I / D, O)
        contenders["tables, 16 bits (axis in)"] = lambda: codebook.multiply_by_tables(
            x_BI[0], packed_in, centroids_KD, size, threads=threads
        )
        contenders["tables, exact (axis in)"] = lambda: codebook.multiply_by_tables(
            x_BI[0], packed_in, centroids_KD, size, exact=True, threads=threads
        )
    return paired(contenders, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("results/bench/codebook_linear.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    goals = []
    for K, D in ((65500, 4), (4096, 4), (256, 4), (65500, 6), (65500, 9)):
        size = options.size // D * D
        rows = measure(size, K, D, options.threads, options.repeats)
        results[f"{size}x{size}, D={D}, K={K}"] = rows
        print(f"\n{size}x{size}, D={D}, K={K}, {options.threads} thread(s): CPU ms (wall ms)")
        for name, r in rows.items():
            print(f"  {name:30s} {r['cpu_ms']:9.2f} ({r['wall_ms']:.2f})")
        ms = {name: r["cpu_ms"] for name, r in rows.items()}
        if D == 4 and K == 65500:
            goals += [
                (
                    "multiply against gather-then-matmul, K=65,500",
                    ms["gather, then matmul (torch)"] / ms["multiply, float16 codebook"],
                    15,
                ),
                (
                    "multiply against dense bfloat16, K=65,500",
                    ms["dense bfloat16 (torch)"] / ms["multiply, float16 codebook"],
                    0.9,
                ),
                ("codebook gradient against index_add_, K=65,500", ms["index_add_ (torch)"] / ms["gradient"], 3.5),
            ]
        if D == 4 and K == 256:
            goals += [
                (
                    "tables against gather-then-matmul, K=256",
                    ms["gather, then matmul (torch)"] / ms["tables, 16 bits (axis in)"],
                    100,
                ),
                (
                    "tables against dense bfloat16, K=256",
                    ms["dense bfloat16 (torch)"] / ms["tables, 16 bits (axis in)"],
                    5,
                ),
            ]
    print(f"\n{'goal':50s} {'at least':>9s} {'measured':>9s}")
    for what, ratio, least in goals:
        print(f"{what:50s} {least:8.1f}x {ratio:8.1f}x {'met' if ratio >= least else 'MISSED'}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "threads": options.threads,
        "torch": torch.__version__,
        "results": results,
        "goals": [dict(zip(("what", "ratio", "at_least"), g, strict=True)) for g in goals],
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
