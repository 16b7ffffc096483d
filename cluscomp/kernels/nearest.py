"""Nearest centroid of every point: the inner loop of K-means."""

import faiss
import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # distances held at once by the plain search: 64 MiB of float32


def nearest(points_ND: Float[Tensor, "N D"], centroids_KD: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
    """Index of the nearest centroid (squared Euclidean distance) of each point; ties go to the lowest index.

    Shapes: float32 (N, D) and (K, D) on one device -> int64 (N,). On the CPU this is faiss' exact flat search, the
    engine of the paper's code; elsewhere the chunked matrix product of `nearest_plain`. Both work in float32, so two
    centroids whose distances differ by less than float32 rounding may be exchanged.
    """
    if points_ND.device.type != "cpu":
        return nearest_plain(points_ND, centroids_KD)
    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(centroids_KD.numpy())
    _, codes_N1 = index.search(points_ND.numpy(), 1)
    return torch.from_numpy(codes_N1[:, 0].copy())


def nearest_plain(points_ND: Float[Tensor, "N D"], centroids_KD: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
    """The reference of `nearest` in plain torch, on any device and in the points' own precision.

    Shapes: (N, D) and (K, D) -> int64 (N,). The chunk size depends on K alone, so results do not depend on memory.
    """
    half_norms_K = centroids_KD.square().sum(1) / 2
    chunk = max(1, CHUNK_ELEMENTS // len(centroids_KD))
    return torch.cat([(half_norms_K - chunk_ND @ centroids_KD.T).argmin(1) for chunk_ND in points_ND.split(chunk)])
