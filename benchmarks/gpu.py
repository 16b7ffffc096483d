"""K-means and the codebook layer on a GPU, beside plain torch and, where it is installed, flash-kmeans, in one run.

    python benchmarks/gpu.py [--size 4096] [--repeats 5] [--rounds 20] [--output FILE]

Times are milliseconds between two CUDA events, medians after one round to warm up (which compiles the kernels).
Points are those of benchmarks/kmeans.py: a synthetic matrix in sub-vectors. Every codebook searched is one that a few
rounds have trained, and every search's codes are compared with plain torch's on a sample of the points.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from kmeans import synthetic

from cluscomp.kernels import codebook, lloyd_torch
from cluscomp.kernels.codes import pack
from cluscomp.kernels.lloyd import BEST, lloyd
from cluscomp.kernels.lloyd_torch import assign_reference


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def wrong(codes_N: torch.Tensor, points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> int:
    """How many of 20,000 sampled points have a code whose float64 distance is above that of plain torch's."""
    sample = torch.randperm(len(points_ND), device=points_ND.device)[:20_000]
    x, c = points_ND[sample].double(), centroids_KD.double()
    plain = assign_reference(points_ND[sample], centroids_KD)[0]
    ours, theirs = ((x - c[codes.long()]).square().sum(1) for codes in (codes_N[sample], plain))
    return int((ours > theirs * (1 + 1e-5)).sum())


def clustering(points_ND: torch.Tensor, K: int, options: argparse.Namespace) -> dict[str, float]:
    D, warm = points_ND.shape[1], lloyd(points_ND, K, **BEST | {"iterations": 4})
    c = warm.centroids_KD
    codes, order = warm.codes_N.sort(stable=True)
    sorted_ND = points_ND[order]
    few = points_ND[: max(1, 2**34 // K)]  # brute force is scaled to all points
    results = {
        "torch, brute force": len(points_ND) / len(few) * milliseconds(lambda: assign_reference(few, c), 1),
        "assign": milliseconds(lambda: lloyd_torch.assign(points_ND, c), options.repeats),
        "assign, wrong of 20,000": wrong(lloyd_torch.assign(points_ND, c)[0], points_ND, c),
        "moments": milliseconds(
            lambda: lloyd_torch._moments(
                sorted_ND, None, torch.searchsorted(codes, torch.arange(K + 1, device=c.device, dtype=torch.int32))
            ),
            options.repeats,
        ),
        "sort and gather": milliseconds(lambda: points_ND[warm.codes_N.sort(stable=True)[1]], options.repeats),
        "kd": milliseconds(lambda: lloyd_torch.kd(points_ND, K, None, 0), options.repeats),
        f"lloyd, {options.rounds} rounds": milliseconds(
            lambda: lloyd(points_ND, K, **BEST | {"iterations": options.rounds}), 1
        ),
    }
    if lloyd_torch.runs_triton(points_ND):
        from cluscomp.kernels import lloyd_triton

        _, sure = lloyd_triton.screen(points_ND, c)
        results["screen"] = milliseconds(lambda: lloyd_triton.screen(points_ND, c), options.repeats)
        results["screen, sure (%)"] = 100 * float(sure.float().mean())
        if D <= 9:
            near = lloyd_triton.assign_near(sorted_ND, c, codes)[0]
            results["boxes"] = milliseconds(lambda: lloyd_triton.assign_near(sorted_ND, c, codes), options.repeats)
            results["boxes, wrong of 20,000"] = wrong(near, sorted_ND, c)
    if importlib.util.find_spec("flash_kmeans"):
        from flash_kmeans import batch_kmeans_Euclid

        results[f"flash-kmeans, {options.rounds} rounds"] = milliseconds(
            lambda: batch_kmeans_Euclid(points_ND[None], n_clusters=K, max_iters=options.rounds, tol=-1.0), 1
        )
    return results


def layer(size: int, K: int, D: int, repeats: int) -> dict[str, float]:
    g = torch.Generator(device="cuda").manual_seed(0)
    bits = (K - 1).bit_length()
    codes = torch.randint(0, K, (size, size // D), generator=g, device="cuda", dtype=torch.int32)
    packed, book = pack(codes.flatten(), bits), torch.randn(K, D, generator=g, device="cuda").bfloat16()
    dense = codebook.rebuild(book, packed, bits, size, size // D * D)
    grad, one, eight = (torch.randn(n, size, generator=g, device="cuda").bfloat16() for n in (size, 1, 8))
    grad = grad[:, : size // D * D].contiguous()
    calls = {
        "gather (torch)": lambda: torch.nn.functional.embedding(codes, book),
        "decode": lambda: codebook.rebuild(book, packed, bits, size, size // D * D),
        "dense product, 1 token (torch)": lambda: one @ dense,
        "product, 1 token": lambda: codebook.multiply(one, packed, bits, book, size // D * D),
        "dense product, 8 tokens (torch)": lambda: eight @ dense,
        "product, 8 tokens": lambda: codebook.multiply(eight, packed, bits, book, size // D * D),
        "gradient, index_add_ (torch)": lambda: codebook.gradient_reference(grad, packed, bits, K, D),
        "gradient": lambda: codebook.gradient(grad, packed, bits, K, D),
    }
    return {name: milliseconds(call, repeats) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side of the synthetic matrix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20, help="of K-means")
    parser.add_argument("--output", type=Path, default=Path("results/bench/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: there is no CUDA device here; nothing was measured")
        return
    results: dict[str, dict[str, float]] = {}
    for K, D in ((256, 4), (4096, 4), (65500, 4), (65500, 6), (65500, 9)):
        name = f"{options.size}x4096, D={D}, K={K}"
        results[name] = clustering(synthetic(options.size, 4096, D).cuda(), K, options)
        results[name] |= layer(options.size, K, D, options.repeats)
        print(f"\n{name}, {torch.cuda.get_device_name()}: ms")
        for what, value in results[name].items():
            print(f"  {what:34s} {value:10.3f}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
