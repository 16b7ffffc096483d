"""K-means clustering of sub-vectors: the recipes, over the exact kernels. Knows no model, file or config."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluscomp.kernels import lloyd_torch
from cluscomp.kernels.counting import report
from cluscomp.kernels.lloyd import assign, lloyd
from cluscomp.kernels.lloyd_torch import Clustering
from cluscomp.kernels.loading import native
from cluscomp.kernels.work import Work

INDEXED = 512  # centroids from which on a search of some dimensions makes an index first (native/lloyd.cpp)
INDEXING = 2000  # distances that a centroid's place in the index takes as long as (65,536 of 8 numbers)
ORDERED = 200  # the same, where a spatial order is known
SEARCH = 100  # calls of torch that a search takes as long as by itself, however few points: its checks and threads


@dataclass(frozen=True)
class Recipe:
    """How K-means is run: `iterations` rounds of Lloyd's algorithm from `init`.

    The paper's (section 3.2, faiss' defaults) is random points, over_relaxation 1 (centroids move to their means), no
    moves but into empty clusters. See `cluscomp.kernels.lloyd.lloyd` for what the others do.
    """

    iterations: int
    init: Literal["random_points", "kd"]
    over_relaxation: float
    move_centroids: bool


def kmeans(
    points_ND: Float[Tensor, "N D"],
    num_centroids: int,
    recipe: Recipe,
    generator: torch.Generator,
    weights_N: Float[Tensor, " N"] | None = None,
) -> Clustering:
    """Cluster points: (N, D) float32, bfloat16 or float16 -> centroids (K, D), codes (N,).

    With `weights_N` (not negative) each point counts that much in the means and in the inertia.

    Works on the points' device where that is the CPU or CUDA, else on the CPU's cores, and gives the centroids and
    codes back on it. Depends on points, recipe, the generator's seed and the kind of device alone, not on the number
    of threads. Raises ValueError for K outside 2..N and for points that are not finite.
    """
    if not 2 <= num_centroids <= len(points_ND):
        raise ValueError(f"{num_centroids} centroids for {len(points_ND)} sub-vectors: need 2 to as many as there are")
    if points_ND.is_meta:
        return _without_numbers(points_ND, num_centroids, recipe.iterations)
    seed = int(torch.randint(1 << 62, (), generator=generator))
    at_ND, at_N = _placed(points_ND), None if weights_N is None else _placed(weights_N)
    found = lloyd(at_ND, num_centroids, seed=seed, weights_N=at_N, **asdict(recipe))
    device = points_ND.device
    return Clustering(found.centroids_KD.to(device), found.codes_N.to(device), found.inertia)


def nearest(
    points_ND: Float[Tensor, "N D"], centroids_KD: Float[Tensor, "K D"], order_K: Int[Tensor, " K"] | None = None
) -> Int[Tensor, " N"]:
    """The code (N,) of the nearest centroid of each point (N, D), on the points' device.

    `order_K` (K,) is a `kernels.lloyd.spatial_order` that is known already; the codes do not depend on it.
    Exact and the lowest on a tie, but for machines without the compiled kernels, where faiss decides if it is there.
    """
    if points_ND.is_meta:
        each = float(len(points_ND))  # distances, by centroid
        if len(centroids_KD) >= INDEXED:
            each = each / 4 + (INDEXING if order_K is None else ORDERED)
        report(Work(distances=each * len(centroids_KD), calls=SEARCH))
        return points_ND.new_empty(len(points_ND), dtype=torch.int32)
    points_ND, centroids_KD, device = _placed(points_ND), _placed(centroids_KD), points_ND.device
    search = lloyd_torch.assign if native is None else partial(assign, order_K=order_K)
    codes_N, _ = search(points_ND, centroids_KD)
    return codes_N.to(device)


def _without_numbers(points_ND: Tensor, num_centroids: int, iterations: int) -> Clustering:
    """What `kmeans` holds and does: the points' sorted copy and codes; its index visits more for each dimension.

    Fitted to what `benchmarks/kmeans.py` measured for D = 4 to 12 and K = 256 to 65,500, within 40 %.
    """
    vectors, dim = points_ND.shape
    harder = max(dim - 3, 0.5) ** 1.5 * (num_centroids / 4096) ** (0.1 * max(dim - 4, 0))
    report(Work(pruned=float(vectors) * iterations * harder))
    sorted_ND = points_ND.float().clone()
    codes_N = points_ND.new_empty(vectors, dtype=torch.int32)
    return Clustering(sorted_ND.new_empty(num_centroids, dim), codes_N, [1.0])


def _placed(tensor: Tensor) -> Tensor:
    """The tensor where the kernels can work on it: CUDA or the CPU."""
    return tensor if tensor.is_cuda else tensor.cpu()
