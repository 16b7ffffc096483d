"""K-means clustering of points; knows no model, file or config."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluscomp.kernels.nearest import nearest

SPLIT = 1 / 1024  # relative distance between the two halves of a split cluster (faiss' constant)
LARGEST = 1e15  # of a point's entries: their squares are added in float32


@dataclass(frozen=True)
class Clustering:
    """Centroids (K, D) in float32, the code of each point (N,) in int64, and the sum of squared errors."""

    centroids_KD: Float[Tensor, "K D"]
    codes_N: Int[Tensor, " N"]
    inertia: float


def kmeans(
    points_ND: Float[Tensor, "N D"], num_centroids: int, *, iterations: int, generator: torch.Generator
) -> Clustering:
    """Cluster points by Lloyd's algorithm as the paper does (section 3.2; faiss' `Clustering` with its defaults).

    Shapes: (N, D) of any float dtype -> centroids (K, D), codes (N,). K distinct points are drawn as the start; each
    of the `iterations` assigns every point to its nearest centroid and moves each centroid to the mean of its points;
    an empty cluster takes half of a large one. One more assignment gives the codes. Runs in float32 with sums in
    float64, and depends on the generator's seed alone, not on the number of threads.

    Raises ValueError for K outside 2..N, no iteration, or points that are not finite (or above 1e15).
    """
    if not 2 <= num_centroids <= len(points_ND):
        raise ValueError(f"{num_centroids} centroids for {len(points_ND)} sub-vectors: need 2 to as many as there are")
    if iterations < 1:
        raise ValueError(f"{iterations} iterations: need at least 1")
    points_ND = points_ND.detach().float().contiguous()
    if not bool((points_ND.abs() <= LARGEST).all()):
        raise ValueError(f"NaN, infinity or a value above {LARGEST:g} among the points")
    chosen_K = torch.randperm(len(points_ND), generator=generator)[:num_centroids]
    split_rng = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
    centroids_KD = points_ND[chosen_K.to(points_ND.device)]
    for _ in range(iterations):
        centroids_KD, counts_K = means(points_ND, nearest(points_ND, centroids_KD), num_centroids)
        split_empty(centroids_KD, counts_K, split_rng)
    codes_N = nearest(points_ND, centroids_KD)
    return Clustering(centroids_KD, codes_N, inertia(points_ND, centroids_KD, codes_N))


def inertia(points_ND: Float[Tensor, "N D"], centroids_KD: Float[Tensor, "K D"], codes_N: Int[Tensor, " N"]) -> float:
    """Sum over all points of the squared distance to their centroid, summed in float64."""
    return float((points_ND - centroids_KD[codes_N]).double().square().sum())


def means(
    points_ND: Float[Tensor, "N D"], codes_N: Int[Tensor, " N"], num_centroids: int
) -> tuple[Float[Tensor, "K D"], Int[np.ndarray, " K"]]:
    """Mean and number of each cluster's points: (N, D), (N,) -> (K, D) float32, (K,). Empty clusters get zeros.

    Sums in float64 and in the order of the points, so the result does not depend on threads or device scheduling.
    """
    counts_K = torch.bincount(codes_N.cpu(), minlength=num_centroids).numpy()
    if points_ND.device.type == "cpu":
        codes = codes_N.numpy()
        columns = [np.bincount(codes, weights=column, minlength=num_centroids) for column in points_ND.numpy().T]
        sums_KD = torch.from_numpy(np.stack(columns, axis=1))
    else:
        order_N = codes_N.argsort(stable=True)
        lengths_K = torch.from_numpy(counts_K).to(points_ND.device)
        sums_KD = torch.segment_reduce(points_ND[order_N].double(), "sum", lengths=lengths_K, axis=0)
    divisor_K1 = torch.from_numpy(np.maximum(counts_K, 1)).to(points_ND.device)[:, None]
    return (sums_KD / divisor_K1).float(), counts_K


def split_empty(centroids_KD: Float[Tensor, "K D"], counts_K: Int[np.ndarray, " K"], rng: np.random.Generator) -> None:
    """Give each empty cluster half of a large one, in place; larger clusters are likelier (faiss' rule).

    The two halves start 1/1024 apart on either side of the old centroid.
    """
    signs_D = torch.ones(centroids_KD.shape[1], device=centroids_KD.device)
    signs_D[1::2] = -1
    for empty in np.flatnonzero(counts_K == 0):
        surplus_K = np.maximum(counts_K - 1, 0)
        donor = int(rng.choice(len(counts_K), p=surplus_K / surplus_K.sum()))
        centroids_KD[empty] = centroids_KD[donor] * (1 + SPLIT * signs_D)
        centroids_KD[donor] *= 1 - SPLIT * signs_D
        counts_K[empty] = counts_K[donor] // 2
        counts_K[donor] -= counts_K[empty]
