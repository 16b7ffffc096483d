"""K-means as in native/lloyd.cpp and native/kd.cpp, one piece after the other, all distances taken."""

import numpy as np
import torch

from cluscomp.kernels.lloyd_torch import Clustering, Progress, assign_reference, move_to_worst, refill_as_faiss


def kd(points_ND: torch.Tensor, K: int, weights_N: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
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


def lloyd(
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
    c_KD = kd(points_ND, K, weights_N, seed) if first_KD is None else first_KD.clone()
    random = np.random.default_rng(seed)
    inertia: list[float] = []
    best, best_KD, best_N = np.inf, c_KD, None
    for done in range(iterations + 1):
        codes_N, distances_N = assign_reference(points_ND, c_KD)
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
