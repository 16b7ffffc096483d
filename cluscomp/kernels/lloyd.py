"""Exact K-means of short vectors: compiled where possible, and the same in plain torch.

`assign` and `lloyd` are exact: every point gets its nearest centroid (distances as float32 sums of squared
differences, lowest number on a tie). They differ from brute force only in what they need not look at.
"""

import numpy as np
import torch

from cluscomp.kernels import lloyd_torch
from cluscomp.kernels.lloyd_torch import Clustering, Progress
from cluscomp.kernels.loading import native, number_of_threads

MOST = 2**31 - 1
VALUES_AT_MOST = 2**20  # distinct numbers that are clustered exactly
LARGEST = 1e15  # of points; up to 1024 squares of differences are added in float32

# The paper's recipe (faiss.Kmeans with 20 iterations), and ours; keyword arguments of `lloyd`.
REFERENCE = {"iterations": 20, "init": "random_points", "over_relaxation": 1.0, "move_centroids": False}
BEST = {"iterations": 20, "init": "kd", "over_relaxation": 1.9, "move_centroids": True}


def spatial_order(centroids_KD: torch.Tensor, *, threads: int | None = None) -> torch.Tensor | None:
    """An order of centroids (K, D) for `assign`, (K,) int32, in which neighbours are near each other.

    It is most of what a search of few points costs, and serves all centroids that lie about as these do. None where
    there is no compiled kernel to use it, as on a GPU.
    """
    centroids_KD = _checked(centroids_KD, "centroids").float()
    if native is None or centroids_KD.is_cuda:
        return None
    _refuse_not_finite(centroids_KD, "centroids")
    order_K = torch.empty(len(centroids_KD), dtype=torch.int32)
    native.spatial_order(centroids_KD, order_K, number_of_threads(threads))
    return order_K


def assign(
    points_ND: torch.Tensor,
    centroids_KD: torch.Tensor,
    *,
    order_K: torch.Tensor | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid of every point and the squared distance to it; exact, lowest number on a tie.

    Args:
        points_ND: (N, D) float32, bfloat16 or float16, on the CPU or a CUDA device.
        centroids_KD: (K, D) of the same kinds, on the same device; compared in float32.
        order_K: (K,), a `spatial_order` that is known. The result does not depend on it.
        threads: of the CPU; as many as torch uses, where None. The result does not depend on it.

    Returns:
        codes_N int32 and distances_N float32.

    Raises:
        ValueError, TypeError: what is wrong, in a sentence.
    """
    points_ND, centroids_KD = _checked(points_ND, "points"), _checked(centroids_KD, "centroids").float()
    if points_ND.shape[1] != centroids_KD.shape[1]:
        raise ValueError(
            f"points have D = {points_ND.shape[1]}, centroids D = {centroids_KD.shape[1]}; they must agree"
        )
    if points_ND.device != centroids_KD.device:
        raise ValueError(f"points are on {points_ND.device}, centroids on {centroids_KD.device}; they must agree")
    _refuse_not_finite(centroids_KD, "centroids")
    threads = number_of_threads(threads)
    if native is None or points_ND.is_cuda:
        _refuse_not_finite(points_ND, "points")
        if points_ND.is_cuda:
            return lloyd_torch.assign(points_ND, centroids_KD)
        return lloyd_torch.assign_reference(points_ND, centroids_KD)
    codes_N = torch.empty(len(points_ND), dtype=torch.int32)
    distances_N = torch.empty(len(points_ND))
    native.assign(points_ND, centroids_KD, codes_N, distances_N, threads, order=order_K)
    return codes_N, distances_N


def lloyd(  # noqa: PLR0912
    points_ND: torch.Tensor,
    num_centroids: int,
    *,
    iterations: int = 20,
    init: str | torch.Tensor = "kd",
    over_relaxation: float = 1.0,
    move_centroids: bool = False,
    seed: int = 0,
    weights_N: torch.Tensor | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Clustering:
    """K-means by `iterations` rounds of assigning and averaging, then a last assignment.

    `lloyd(points_ND, K, **REFERENCE)` is the paper's recipe, `**BEST` ours. The result depends on the points, the
    settings and the seed only, not on the number of threads. Sums are float64.

    Points on a CUDA device are clustered there (lloyd_torch.py) by the same recipes, and the result is given on it; it
    may differ from the CPU's by the rounding of sums, and in the random numbers of faiss' refills.

    Args:
        points_ND: (N, D) float32, bfloat16 or float16, on the CPU or a CUDA device.
        num_centroids: K, 1 to N.
        init: "random_points" (different points, drawn with the seed), "kd" (cuts space in two at the mean of the
            widest axis; each half gets its share of centroids by the density a fine quantiser wants,
            p^(D/(D+2)); the seed moves the cuts a little), or the first centroids themselves, (K, D).
        over_relaxation: a centroid moves this many times the way to its mean, but for the last three rounds (1 to
            2; above 1 may overshoot: then the next step is 1, and the best codebook seen is what is returned).
        move_centroids: empty clusters give their centroid to the worst ones, which are cut in two (not in the last
            three rounds); else they are refilled by faiss' rule.
        weights_N: (N,) float32, not negative: importance of each point in the means and in the inertia.
        progress: called as progress(round, inertia) after each assignment; what it raises stops the work, as
            Ctrl-C does.

    Raises:
        ValueError, TypeError: what is wrong, in a sentence.

    With D = 1 and init "kd" no iteration is needed: see `scalar`. Where fewer points are distinct than K, the
    centroids left over repeat others.
    """
    points_ND = _checked(points_ND, "points")
    N, D = points_ND.shape
    K = num_centroids
    if not isinstance(K, int) or K < 1:
        raise ValueError(f"num_centroids is {K!r}; it must be a whole number of at least 1")
    if K > N:
        raise ValueError(f"{K} centroids for {N} points; ask for fewer centroids or use shorter sub-vectors")
    if not isinstance(iterations, int) or not 0 <= iterations <= 100_000:
        raise ValueError(f"iterations is {iterations!r}; it must be a whole number from 0 to 100000")
    if not 0 < over_relaxation <= 2:
        raise ValueError(f"over_relaxation is {over_relaxation!r}; it must be above 0 and at most 2")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to 2^64 - 1")
    threads = number_of_threads(threads)
    if weights_N is not None:
        weights_N = _checked_weights(weights_N, N, points_ND.device)
    kd = isinstance(init, str) and init == "kd"
    if isinstance(init, torch.Tensor):
        first_KD = _checked(init, "init").to(device=points_ND.device, dtype=torch.float32)
        if first_KD.shape != (K, D):
            raise ValueError(f"init has shape {tuple(first_KD.shape)}; it must be {(K, D)}")
        _refuse_not_finite(first_KD, "init")
    elif kd:
        first_KD = torch.empty(0, D)
    elif init == "random_points":
        chosen = np.random.default_rng(seed).choice(N, K, replace=False, shuffle=False)
        first_KD = points_ND[torch.from_numpy(chosen)].float()
        _refuse_not_finite(first_KD, "points")
    else:
        raise ValueError(f'init is {init!r}; it must be "random_points", "kd" or the first centroids')
    if kd and D == 1:
        weights_N = None if weights_N is None else weights_N.cpu()
        found = scalar(points_ND.cpu(), K, weights_N=weights_N, threads=threads, progress=progress)
        device = points_ND.device
        return Clustering(found.centroids_KD.to(device), found.codes_N.to(device), found.inertia)
    if native is None or points_ND.is_cuda:
        _refuse_not_finite(points_ND, "points")
        start_KD = None if kd else first_KD
        return lloyd_torch.lloyd(
            points_ND, K, start_KD, iterations, over_relaxation, move_centroids, seed, weights_N, progress
        )
    centroids_KD = torch.empty(K, D)
    codes_N = torch.empty(N, dtype=torch.int32)
    inertia = native.lloyd(
        points_ND, first_KD, weights_N, centroids_KD, codes_N, iterations, kd, move_centroids, over_relaxation, seed,
        threads, "choose", "", progress,
    )  # fmt: skip
    return Clustering(centroids_KD, codes_N, inertia)


def scalar(
    points_N1: torch.Tensor,
    num_centroids: int,
    *,
    weights_N: torch.Tensor | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Clustering:
    """K-means of numbers, solved exactly by dynamic programming over the distinct values.

    16-bit weights have few distinct values, so this takes milliseconds. Where there are more than 2^26 / K (or
    2^20) of them, neighbours are first merged into bins (each the same part of mass^(1/3) gap^(2/3)), the optimum
    for the bins is taken and improved by Lloyd's iteration on all values until it stands still: then a very good
    optimum, not the proven one.
    """
    values_N = points_N1.reshape(-1).float()
    _refuse_not_finite(values_N[:, None], "points")
    values_M, codes_N = torch.unique(values_N, return_inverse=True)
    mass_M = np.bincount(codes_N.numpy(), None if weights_N is None else weights_N.numpy(), len(values_M)).astype(
        np.float64
    )
    values_M = values_M.double().numpy()
    values_M, mass_M = values_M[mass_M > 0], mass_M[mass_M > 0]
    K, M = num_centroids, len(values_M)
    if M <= K:
        centroids_K = np.concatenate([values_M, np.full(K - M, values_M[-1])])
    else:
        most = max(K, min(VALUES_AT_MOST, 2**26 // K) if native else min(VALUES_AT_MOST, 4096))
        if most >= M:
            starts_K = _best_groups(values_M, mass_M, K)
        else:
            part_M = np.cbrt(mass_M * np.gradient(values_M) ** 2)
            bins_M = np.minimum((np.cumsum(part_M) - part_M / 2) / part_M.sum() * most, most - 1).astype(np.int64)
            first_B = np.flatnonzero(np.diff(bins_M, prepend=-1))  # where each bin that holds anything begins
            bin_mass_B = np.add.reduceat(mass_M, first_B)
            bin_mean_B = np.add.reduceat(mass_M * values_M, first_B) / bin_mass_B
            starts_K = first_B[_best_groups(bin_mean_B, bin_mass_B, min(K, len(first_B)))]
            starts_K = _settled(values_M, mass_M, starts_K)
        centroids_K = np.add.reduceat(mass_M * values_M, starts_K) / np.add.reduceat(mass_M, starts_K)
        centroids_K = np.concatenate([centroids_K, np.full(K - len(centroids_K), centroids_K[-1])])
    centroids_K1 = torch.from_numpy(centroids_K).float()[:, None]
    codes_N, distances_N = assign(values_N[:, None], centroids_K1, threads=threads)
    weighted_N = distances_N.double() if weights_N is None else distances_N.double() * weights_N
    inertia = float(weighted_N.sum())
    if progress is not None:
        progress(0, inertia)
    return Clustering(centroids_K1, codes_N, [inertia])


def _best_groups(values_M: np.ndarray, mass_M: np.ndarray, K: int) -> np.ndarray:
    if len(values_M) <= K:
        return np.arange(len(values_M))
    if native is None:
        return best_groups_reference(values_M, mass_M, K)
    return np.asarray(native.best_groups(values_M.tolist(), mass_M.tolist(), K))


def _settled(values_M: np.ndarray, mass_M: np.ndarray, starts_K: np.ndarray) -> np.ndarray:
    """Lloyd's iteration on sorted values, where groups are intervals, until nothing changes (1000 rounds at most)."""
    for _ in range(1000):
        mean_K = np.add.reduceat(mass_M * values_M, starts_K) / np.add.reduceat(mass_M, starts_K)
        moved_K = np.concatenate([[0], np.searchsorted(values_M, (mean_K[1:] + mean_K[:-1]) / 2, side="right")])
        moved_K = np.unique(moved_K)
        if np.array_equal(moved_K, starts_K):
            break
        starts_K = moved_K
    return starts_K


def _checked(rows: torch.Tensor, name: str) -> torch.Tensor:
    """Rows as a contiguous tensor without gradient, or a sentence saying why they cannot serve."""
    if isinstance(rows, np.ndarray):
        rows = torch.from_numpy(np.array(rows))
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"{name} is a {type(rows).__name__}; it must be a torch tensor or a numpy array")
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} is {rows.dtype}; it must be float32, bfloat16 or float16")
    if rows.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; it must have two dimensions, (number, D)")
    if rows.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {rows.device}; it must be on the CPU or a CUDA device")
    if rows.shape[0] < 1 or rows.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; both numbers must be at least 1")
    if rows.shape[0] > MOST - 16:
        raise ValueError(f"{name} has {rows.shape[0]} rows; at most {MOST - 16} fit 32-bit codes")
    if rows.shape[1] > 1024:
        raise ValueError(f"{name} has D = {rows.shape[1]}; at most 1024 is supported (sub-vectors are short)")
    return rows.detach().contiguous()


def _checked_weights(weights_N: torch.Tensor, N: int, device: torch.device) -> torch.Tensor:
    weights_N = torch.as_tensor(weights_N).detach()
    if weights_N.shape != (N,):
        raise ValueError(f"weights has shape {tuple(weights_N.shape)}; it must be {(N,)}, one for each point")
    weights_N = weights_N.to(device=device, dtype=torch.float32).contiguous()
    wrong = ~(weights_N >= 0) | (weights_N > 1e18)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"weights[{i}] is {weights_N[i]}; weights must be finite, within 1e18 and not negative")
    if not weights_N.any():
        raise ValueError("all weights are zero; at least one must be positive")
    return weights_N


def _refuse_not_finite(rows: torch.Tensor, name: str) -> None:
    largest = 10 * LARGEST if name == "centroids" else LARGEST  # an over-relaxed centroid may lie outside of all points
    for at in range(0, len(rows), 1 << 20):  # in pieces: no second copy of the points
        wrong = ~(rows[at : at + (1 << 20)].float().abs() <= largest)
        if wrong.any():
            i, d = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name}[{at + i}, {d}] is {rows[at + i, d]}; every coordinate must be finite and within {largest:g}"
            )


# ---- the same in plain torch and numpy: what the compiled code is compared with, and replaced by where missing ----


def best_groups_reference(values_M: np.ndarray, mass_M: np.ndarray, K: int) -> np.ndarray:
    """First value of each of the K groups of least error, by dynamic programming in K M^2 steps: (M,), (M,) -> (K,)."""
    M = len(values_M)
    v = values_M - np.average(values_M, weights=mass_M)
    W, S, Q = (np.concatenate([[0.0], np.cumsum(mass_M * v**p)]) for p in (0, 1, 2))

    def error(i: np.ndarray, j: int) -> np.ndarray:
        return np.maximum(Q[j] - Q[i] - (S[j] - S[i]) ** 2 / (W[j] - W[i]), 0)  # type: ignore[no-any-return]

    least = np.array([np.inf] + [error(np.array([0]), j)[0] for j in range(1, M + 1)])
    cuts = np.zeros((K, M + 1), dtype=np.int64)
    for k in range(1, K):
        now = np.full(M + 1, np.inf)
        for j in range(k + 1, M + 1):
            i = np.arange(k, j)
            total = least[i] + error(i, j)
            cuts[k, j] = i[total.argmin()]
            now[j] = total.min()
        least = now
    starts, j = [], M
    for k in range(K - 1, -1, -1):
        j = cuts[k, j]
        starts.append(j)
    return np.array(starts[::-1])
