"""Exact K-means of short vectors: compiled where possible, and the same in plain torch.

`assign` and `lloyd` are exact: every point gets its nearest centroid (distances as float32 sums of squared
differences, lowest number on a tie). They differ from brute force only in what they need not look at.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cluscomp.kernels.loading import native, number_of_threads

MOST = 2**31 - 1
VALUES_AT_MOST = 2**20  # distinct numbers that are clustered exactly
LARGEST = 1e15  # of points; up to 1024 squares of differences are added in float32

# The paper's recipe (faiss.Kmeans with 20 iterations), and ours; keyword arguments of `lloyd`.
REFERENCE = {"iterations": 20, "init": "random_points", "over_relaxation": 1.0, "move_centroids": False}
BEST = {"iterations": 20, "init": "kd", "over_relaxation": 1.9, "move_centroids": True}

Progress = Callable[[int, float], None]


class Clustering(NamedTuple):
    """centroids_KD float32 in spatial order, codes_N int32, inertia at each of the iterations + 1 assignments."""

    centroids_KD: torch.Tensor
    codes_N: torch.Tensor
    inertia: list[float]


def assign(
    points_ND: torch.Tensor, centroids_KD: torch.Tensor, *, threads: int | None = None, search: str = "choose"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid of every point and the squared distance to it; exact, lowest number on a tie.

    Args:
        points_ND: (N, D) float32, bfloat16 or float16, on the CPU or a CUDA device.
        centroids_KD: (K, D) of the same kinds, on the same device; compared in float32.
        threads: of the CPU; as many as torch uses, where None. The result does not depend on it.
        search: "choose", or for measurements on the CPU "brute" or "boxes".

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
        from cluscomp.kernels import lloyd_gpu

        return lloyd_gpu.assign(points_ND, centroids_KD)
    if native is None:
        return assign_reference(points_ND, centroids_KD)
    codes_N = torch.empty(len(points_ND), dtype=torch.int32)
    distances_N = torch.empty(len(points_ND))
    native.assign(points_ND, centroids_KD, codes_N, distances_N, threads, search)
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
    search: str = "choose",
) -> Clustering:
    """K-means by `iterations` rounds of assigning and averaging, then a last assignment.

    `lloyd(points_ND, K, **REFERENCE)` is the paper's recipe, `**BEST` ours. The result depends on the points, the
    settings and the seed only, not on the number of threads. Sums are float64.

    Points on a CUDA device are clustered there (lloyd_gpu.py) by the same recipes, and the result is given on it; it
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
    if points_ND.is_cuda:
        from cluscomp.kernels import lloyd_gpu

        return lloyd_gpu.lloyd(
            points_ND,
            K,
            None if kd else first_KD,
            iterations,
            over_relaxation,
            move_centroids,
            seed,
            weights_N,
            progress,
        )
    if native is None:
        return lloyd_reference(
            points_ND,
            K,
            None if kd else first_KD,
            iterations,
            over_relaxation,
            move_centroids,
            seed,
            weights_N,
            progress,
        )
    centroids_KD = torch.empty(K, D)
    codes_N = torch.empty(N, dtype=torch.int32)
    inertia = native.lloyd(
        points_ND, first_KD, weights_N, centroids_KD, codes_N, iterations, kd, move_centroids, over_relaxation, seed,
        threads, search, "", progress,
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


def assign_plain(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`assign` by faiss' exact flat search where that is installed, some 20 times faster than torch: (N,), (N,)."""
    try:
        import faiss
    except ImportError:
        return assign_reference(points_ND, centroids_KD)
    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(centroids_KD.numpy())
    _, codes_N1 = index.search(points_ND.numpy(), 1)
    codes_N = torch.from_numpy(codes_N1[:, 0])
    return codes_N.int(), (points_ND - centroids_KD[codes_N]).square().sum(1)


def assign_reference(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`assign` by all distances, in pieces of at most 2^22 distances: (N,) int32, (N,) float32."""
    piece = max(1, 2**22 // len(centroids_KD))
    codes, distances = [], []
    for some_PD in points_ND.split(piece):
        difference_PK = some_PD[:, :1].float() - centroids_KD[:, 0]
        distance_PK = difference_PK * difference_PK
        for d in range(1, points_ND.shape[1]):
            torch.sub(some_PD[:, d : d + 1].float(), centroids_KD[:, d], out=difference_PK)
            distance_PK.addcmul_(difference_PK, difference_PK)
        code_P1 = distance_PK.argmin(1, keepdim=True)  # on every device the first of equals
        codes.append(code_P1[:, 0].int())
        distances.append(distance_PK.gather(1, code_P1)[:, 0])
    return torch.cat(codes), torch.cat(distances)


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


def kd_reference(points_ND: torch.Tensor, K: int, weights_N: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """The means of a kd split with the density-optimal share of centroids (native/kd.cpp says why), one per piece."""
    D = points_ND.shape[1]
    weights_N = torch.ones(len(points_ND)) if weights_N is None else weights_N

    def measure(rows_n: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        x, w = points_ND[rows_n].double(), weights_N[rows_n].double()
        mass = float(w.sum())
        if mass <= 0:
            return 0.0, x[0], torch.zeros(D, dtype=torch.float64)
        mean_D = (w[:, None] * x).sum(0) / mass
        return mass, mean_D, ((w[:, None] * x * x).sum(0) / mass - mean_D**2).clamp(min=0)

    def share(mass: float, variance_D: torch.Tensor) -> float:
        return float((mass * float(variance_D.sum())) ** (D / (D + 2)))

    def draw(first: int, budget: int) -> float:
        z = (seed + 0x9E3779B97F4A7C15 * (first * 65537 + budget)) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        return float((z - 2**64 if z >= 2**63 else z) >> 11) * 2.0**-52

    rows_N = torch.arange(len(points_ND))
    open_pieces, centroids = [(rows_N, K, *measure(rows_N))], list[torch.Tensor]()
    while open_pieces:
        rows_n, budget, mass, mean_D, variance_D = open_pieces.pop()
        axis = int(variance_D.argmax())
        moved = mean_D[axis] + 0.05 * draw(len(centroids), budget) * variance_D[axis].sqrt()
        low_n = points_ND[rows_n, axis].float() <= moved.float()
        if low_n.all() or not low_n.any():
            low_n = points_ND[rows_n, axis].float() <= mean_D[axis].float()
        if budget < 2 or mass <= 0 or low_n.all() or not low_n.any():
            centroids += [mean_D.float()] * budget
            continue
        a, b = rows_n[low_n], rows_n[~low_n]
        of_a, of_b = measure(a), measure(b)
        wants_a, wants_b = share(of_a[0], of_a[2]), share(of_b[0], of_b[2])
        part = wants_a / (wants_a + wants_b) if wants_a + wants_b > 0 else 0.5
        k = min(max(int(part * budget + 0.5), 1, budget - len(b)), budget - 1, len(a))
        open_pieces += [(b, budget - k, *of_b), (a, k, *of_a)]
    return torch.stack(centroids)


def lloyd_reference(
    points_ND: torch.Tensor,
    K: int,
    first_KD: torch.Tensor | None = None,
    iterations: int = 20,
    over_relaxation: float = 1.0,
    move_centroids: bool = False,
    seed: int = 0,
    weights_N: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Clustering:
    """`lloyd` (first_KD None: kd) in plain torch, arguments already checked; centroids in the order of the first ones.

    Clusters without points are drawn a donor as in the compiled code, but with numpy's random numbers.
    """
    D = points_ND.shape[1]
    points_ND = points_ND.float()
    weight_N = torch.ones(len(points_ND), dtype=torch.float64) if weights_N is None else weights_N.double()
    c_KD = kd_reference(points_ND, K, weights_N, seed) if first_KD is None else first_KD.clone()
    random = np.random.default_rng(seed)
    inertia: list[float] = []
    best, best_KD, best_N = np.inf, c_KD, None
    for done in range(iterations + 1):
        codes_N, distances_N = assign_plain(points_ND, c_KD)
        now = float((distances_N.double() * weight_N).sum())
        rose = now > best
        if not rose:
            best, best_KD, best_N = now, c_KD.clone(), codes_N
        inertia.append(best if done == iterations else now)
        if progress is not None:
            progress(done, inertia[-1])
        if done == iterations:
            break
        index_N = codes_N.long()
        count_K = torch.bincount(index_N, minlength=K)
        mass_K = torch.zeros(K, dtype=torch.float64).index_add_(0, index_N, weight_N)
        sums = [
            torch.zeros(K, D, dtype=torch.float64).index_add_(0, index_N, weight_N[:, None] * points_ND.double() ** p)
            for p in (1, 2)
        ]
        full_K = mass_K > 0
        mean_KD = sums[0] / mass_K.clamp(min=1e-300)[:, None]
        variance_KD = torch.where(full_K[:, None], sums[1] / mass_K.clamp(min=1e-300)[:, None] - mean_KD**2, 0.0).clamp(
            min=0
        )
        step = 1.0 if rose or done >= iterations - 3 else over_relaxation
        c_KD[full_K] += step * (mean_KD[full_K] - c_KD[full_K].double()).float()
        if not move_centroids:
            refill_as_faiss(c_KD, count_K, random)
        elif done < iterations - 3:
            move_to_worst(c_KD, count_K, mass_K, variance_KD)
    assert best_N is not None
    return Clustering(best_KD, best_N, inertia)


def refill_as_faiss(c_KD: torch.Tensor, count_K: torch.Tensor, random: np.random.Generator) -> None:
    """Gives each empty cluster, in c_KD itself, half of one drawn with probability ~ count_K - 1."""
    chance_K = (count_K - 1).clamp(min=0).double().numpy()
    up_D = 1 + (1 - 2 * (torch.arange(c_KD.shape[1]) % 2)) / 1024
    for k in (count_K == 0).nonzero().flatten().tolist():
        if chance_K.sum() == 0:
            return
        donor = int(random.choice(len(chance_K), p=chance_K / chance_K.sum()))
        c_KD[k] = c_KD[donor] * up_D
        c_KD[donor] *= 2 - up_D


def move_to_worst(c_KD: torch.Tensor, count_K: torch.Tensor, mass_K: torch.Tensor, variance_KD: torch.Tensor) -> None:
    """Gives the centroids of empty clusters, in c_KD itself, to the worst ones, cut in two as in native/lloyd.cpp."""
    cost_K = mass_K * variance_KD.sum(1)
    empty = (count_K == 0).nonzero().flatten().tolist()[: len(c_KD) // 2]
    for k, worst in zip(empty, cost_K.argsort(descending=True, stable=True).tolist(), strict=False):
        if cost_K[worst] <= 0:
            return
        axis = int(variance_KD[worst].argmax())
        shift = 0.8 * float(variance_KD[worst, axis]) ** 0.5
        c_KD[k] = c_KD[worst]
        c_KD[k, axis] += shift
        c_KD[worst, axis] -= shift
