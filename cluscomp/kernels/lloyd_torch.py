"""K-means in torch, for a GPU or without compiled kernels: native/lloyd.cpp and kd.cpp, many clusters at a time.

Works on any device: on CUDA by the kernels of lloyd_triton.py (torch for CUDA on Linux brings Triton along),
elsewhere, and for D above theirs, by plain torch in pieces, and faiss for the distances on the CPU where that is.
Points are kept sorted by cluster, and sums are float64 in a fixed order, so the same machine gives the same bits every
time; another device may round sums differently.
Arguments are those of `kernels.lloyd.lloyd`, already checked.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cluscomp.kernels.loading import runs_triton

LEAF = 16  # centroids whose order does not matter
NEAR_K = {1: 4096, 2: 4096, 3: 4096, 4: 4096, 5: 32768, 6: 32768}  # from these on boxes pay; by counting operations
DITHER = 0.05  # of a cut, in standard deviations (native/kd.cpp)

Progress = Callable[[int, float], None]


class Clustering(NamedTuple):
    """centroids_KD float32 in spatial order, codes_N int32, inertia at each of the iterations + 1 assignments."""

    centroids_KD: torch.Tensor
    codes_N: torch.Tensor
    inertia: list[float]


def assign(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fastest assignment there is on the points' device: codes_N int32 and distances_N float32.

    Exact and the lowest number on a tie, but for the CPU's, where faiss rounds distances in its own way.
    """
    if _by_triton(points_ND):
        from cluscomp.kernels import lloyd_triton

        return lloyd_triton.assign(points_ND, centroids_KD)
    return assign_reference(points_ND, centroids_KD) if points_ND.is_cuda else assign_faiss(points_ND, centroids_KD)


def assign_faiss(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`assign` by faiss' exact flat search where that is installed, some 20 times faster than torch: (N,), (N,)."""
    try:
        import faiss
    except ImportError:
        return assign_reference(points_ND, centroids_KD)
    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(centroids_KD.numpy())
    _, codes_N1 = index.search(points_ND.float().numpy(), 1)
    codes_N = torch.from_numpy(codes_N1[:, 0])
    return codes_N.int(), (points_ND.float() - centroids_KD[codes_N]).square().sum(1)


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


def lloyd(
    points_ND: torch.Tensor,
    K: int,
    first_KD: torch.Tensor | None,
    iterations: int,
    over_relaxation: float,
    move_centroids: bool,
    seed: int,
    weights_N: torch.Tensor | None,
    progress: Progress | None,
) -> Clustering:
    """`kernels.lloyd.lloyd` on the points' device (first_KD None: kd); random refills are numpy's."""
    row_N = torch.arange(len(points_ND), device=points_ND.device)  # where the sorted points come from
    code_N: torch.Tensor | None = None
    if first_KD is None:
        c_KD, code_N, row_N = kd(points_ND, K, weights_N, seed)
        points_ND, weights_N = _rows(points_ND, row_N), None if weights_N is None else weights_N[row_N]
    else:
        c_KD = first_KD
    random = np.random.default_rng(seed)
    inertia: list[float] = []
    best, best_KD, disturbed = math.inf, c_KD, True
    for done in range(iterations + 1):
        if disturbed or done & (done + 1) == 0:  # centroids drift out of their spatial order
            order_K = spatial_order(c_KD)
            c_KD = c_KD[order_K]
            code_N = None if code_N is None else order_K.argsort().int()[code_N]
        code_N, distance_N = _assign_near(points_ND, c_KD, code_N)
        now = float((distance_N.double() if weights_N is None else distance_N.double() * weights_N).sum())
        rose = now > best
        if not rose:
            best, best_KD = now, c_KD
        elif done == iterations:  # the best codebook seen is kept
            c_KD = best_KD
            code_N, _ = assign(points_ND, c_KD)
        inertia.append(best if done == iterations else now)
        if progress is not None:
            progress(done, inertia[-1])
        if done == iterations:
            break
        code_N, order_N = code_N.sort(stable=True)
        points_ND, row_N = _rows(points_ND, order_N), row_N[order_N]
        weights_N = None if weights_N is None else weights_N[order_N]
        begin_K = torch.searchsorted(code_N, torch.arange(K + 1, device=code_N.device, dtype=torch.int32))
        mass_K, mean_KD, variance_KD = _spread(_moments(points_ND, weights_N, begin_K))
        step = 1.0 if rose or done >= iterations - 3 else over_relaxation
        moved_KD = c_KD + step * (mean_KD - c_KD.double()).float()
        c_KD = torch.where(mass_K[:, None] > 0, moved_KD, c_KD)
        count_K = begin_K.diff()
        disturbed = False
        if bool((count_K == 0).any()):
            new_KD = c_KD.cpu().clone()  # few centroids, one after the other
            if not move_centroids:
                refill_as_faiss(new_KD, count_K.cpu(), random)
            elif done < iterations - 3:
                move_to_worst(new_KD, count_K.cpu(), mass_K.cpu(), variance_KD.cpu())
                disturbed = True
            c_KD = new_KD.to(c_KD.device)
    assert code_N is not None
    codes_N = torch.empty_like(code_N)
    codes_N[row_N] = code_N
    return Clustering(c_KD, codes_N, inertia)


def kd(
    points_ND: torch.Tensor, K: int, weights_N: torch.Tensor | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The start of native/kd.cpp, all pieces of a level cut at once.

    Returns:
        centroids_KD float32, codes_N int32 (sorted) and rows_N: the point that each of these codes belongs to.
    """
    (N, D), device = points_ND.shape, points_ND.device
    row_N = torch.arange(N, device=device)
    begin_P = torch.tensor([0, N], device=device)  # a piece is the run of points from begin_P[p] to begin_P[p + 1]
    first_P, budget_P = torch.tensor([0], device=device), torch.tensor([K], device=device)  # its centroids
    moments_P = _moments(points_ND, weights_N, begin_P)
    while True:
        mass_P, mean_PD, variance_PD = _spread(moments_P)
        size_P = begin_P.diff()
        axis_P1 = variance_PD.argmax(1, keepdim=True)
        mean_P, deviation_P = mean_PD.gather(1, axis_P1)[:, 0], variance_PD.gather(1, axis_P1)[:, 0].sqrt()
        piece_N = torch.repeat_interleave(size_P, output_size=N)
        value_N = points_ND.gather(1, axis_P1[piece_N])[:, 0].float()
        threshold_P = mean_P + DITHER * _draw(first_P, budget_P, seed) * deviation_P
        for _ in range(2):  # where the moved cut leaves one side empty, at the mean
            low_N = value_N <= threshold_P.float()[piece_N]
            low_P = _count(low_N, begin_P)
            parted_P = (low_P > 0) & (low_P < size_P)
            threshold_P = torch.where(parted_P, threshold_P, mean_P)
        cut_P = (budget_P > 1) & (mass_P > 0) & parted_P
        if not bool(cut_P.any()):
            break
        low_N |= ~cut_P[piece_N]
        order_N = (2 * piece_N + ~low_N).int().argsort(stable=True)
        points_ND, row_N = _rows(points_ND, order_N), row_N[order_N]
        weights_N = None if weights_N is None else weights_N[order_N]
        low_P = _count(low_N, begin_P)
        both_P2 = torch.stack([torch.ones_like(cut_P), cut_P], dim=1)  # a piece that is not cut stays as its low half
        begin_P = torch.cat([torch.stack([begin_P[:-1], begin_P[:-1] + low_P], 1)[both_P2], begin_P[-1:]])
        moments_P = _moments(points_ND, weights_N, begin_P)
        mass_C, _, variance_CD = _spread(moments_P)
        want_P2 = torch.zeros(both_P2.shape, dtype=torch.float64, device=device)
        want_P2[both_P2] = (mass_C * variance_CD.sum(1)) ** (D / (D + 2))
        total_P = want_P2.sum(1)
        share_P = torch.where(total_P > 0, want_P2[:, 0] / total_P, 0.5)
        k_P = (share_P * budget_P + 0.5).long()
        k_P = torch.maximum(k_P, (budget_P - (size_P - low_P)).clamp(min=1))  # one each at least, no more than points
        k_P = torch.minimum(k_P, torch.minimum(budget_P - 1, low_P))
        k_P = torch.where(cut_P, k_P, budget_P)
        first_P = torch.stack([first_P, first_P + k_P], 1)[both_P2]
        budget_P = torch.stack([k_P, budget_P - k_P], 1)[both_P2]
    mean_PD = torch.where(mass_P[:, None] > 0, mean_PD, points_ND[begin_P[:-1]].double())
    return mean_PD.float().repeat_interleave(budget_P, dim=0), first_P.int()[piece_N], row_N


def spatial_order(centroids_KD: torch.Tensor) -> torch.Tensor:
    """Numbers of the centroids (K,) so that every run of LEAF 2^i of them, from the start, lies together in space.

    Halves all pieces at the median of their widest axis, level by level.
    """
    K = len(centroids_KD)
    size = LEAF
    while size < K:
        size *= 2
    order_PL = torch.arange(size, device=centroids_KD.device)[None]  # numbers from K on stand for nothing, at infinity
    while order_PL.shape[1] > LEAF:
        c_PLD = centroids_KD[order_PL.clamp(max=K - 1)]
        outside_PL1 = (order_PL >= K)[..., None]
        width_PD = c_PLD.masked_fill(outside_PL1, -math.inf).amax(1) - c_PLD.masked_fill(outside_PL1, math.inf).amin(1)
        axis_P11 = width_PD.argmax(1)[:, None, None]
        value_PL = c_PLD.gather(2, axis_P11.expand(-1, c_PLD.shape[1], 1)).masked_fill(outside_PL1, math.inf)[..., 0]
        order_PL = order_PL.gather(1, value_PL.argsort(dim=1, stable=True)).view(2 * len(order_PL), -1)
    order_K = order_PL.flatten()
    return order_K[order_K < K]


def _assign_near(
    points_ND: torch.Tensor, c_KD: torch.Tensor, code_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`assign`, from the present codes of sorted points where there are any and where that is faster."""
    if code_N is not None and len(c_KD) >= NEAR_K.get(points_ND.shape[1], math.inf) and _by_triton(points_ND):
        from cluscomp.kernels import lloyd_triton

        return lloyd_triton.assign_near(points_ND, c_KD, code_N)
    return assign(points_ND, c_KD)


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


def _rows(points_ND: torch.Tensor, row_n: torch.Tensor) -> torch.Tensor:
    """points_ND[row_n], of whole rows."""
    if _by_triton(points_ND):
        from cluscomp.kernels import lloyd_triton

        return lloyd_triton.rows(points_ND, row_n)
    return points_ND[row_n]


def _moments(sorted_ND: torch.Tensor, weights_N: torch.Tensor | None, begin_K: torch.Tensor) -> torch.Tensor:
    """Mass, sums and sums of squares (K, 1 + 2D) float64 of sorted points, those of k from begin_K[k] on."""
    if _by_triton(sorted_ND):
        from cluscomp.kernels import lloyd_triton

        return lloyd_triton.moments(sorted_ND, weights_N, begin_K)
    count_K = begin_K.diff()

    def total(value_N: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(value_N, "sum", lengths=count_K, initial=0, unsafe=True)

    if weights_N is None:
        mass_K, weight_N = count_K.double(), None
    else:
        weight_N = weights_N.double()
        mass_K = total(weight_N)
    sums, squares = list[torch.Tensor](), list[torch.Tensor]()
    for x_N in sorted_ND.unbind(1):  # one by one: no second copy of the points
        wide_N = x_N.double()
        weighted_N = wide_N if weight_N is None else weight_N * wide_N
        sums.append(total(weighted_N))
        squares.append(total(weighted_N * wide_N))
    return torch.stack([mass_K, *sums, *squares], dim=1)


def _spread(moments_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mass (K,), means and variances (K, D); zeros where there is no mass."""
    D = moments_K.shape[1] // 2
    mass_K = moments_K[:, 0]
    mean_KD, square_KD = (moments_K[:, 1:] / torch.where(mass_K > 0, mass_K, 1.0)[:, None]).split(D, dim=1)
    return mass_K, mean_KD, (square_KD - mean_KD**2).clamp(min=0)


def _count(chosen_N: torch.Tensor, begin_P: torch.Tensor) -> torch.Tensor:
    """How many are chosen in each run (P,)."""
    upto_N = torch.nn.functional.pad(chosen_N.cumsum(0), (1, 0))
    return upto_N[begin_P].diff()


def _draw(first_P: torch.Tensor, budget_P: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform in [-1, 1), by the seed and the piece's centroids, as native/kd.cpp draws: splitmix64's mixing."""

    def signed(number: int) -> int:
        return (number + 2**63) % 2**64 - 2**63

    def folded(z_P: torch.Tensor, shift: int) -> torch.Tensor:  # as unsigned: what comes in from the left is zero
        return z_P ^ (z_P >> shift & (1 << 64 - shift) - 1)

    z_P = (first_P * 65537 + budget_P) * signed(0x9E3779B97F4A7C15) + signed(seed)
    z_P = folded(z_P, 30) * signed(0xBF58476D1CE4E5B9)
    z_P = folded(z_P, 27) * signed(0x94D049BB133111EB)
    return (folded(z_P, 31) >> 11).double() * 2.0**-52


def _by_triton(points_ND: torch.Tensor) -> bool:
    if not runs_triton(points_ND):
        return False
    from cluscomp.kernels import lloyd_triton

    return points_ND.shape[1] <= lloyd_triton.LARGEST_D
