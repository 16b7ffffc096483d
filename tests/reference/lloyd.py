"""K-means by its textbook definition, in float64 and with the distances written out."""

import numpy as np


def distances(points, centroids):
    """Squared Euclidean distances: (N, D), (K, D) -> (N, K)."""
    return np.square(np.float64(points)[:, None, :] - np.float64(centroids)[None, :, :]).sum(2)


def lloyd(points, centroids, iterations):
    """Centroids after some iterations, and whether a cluster was empty in one of them (it then keeps its centroid)."""
    centroids, emptied = np.float64(centroids).copy(), False
    for _ in range(iterations):
        codes = distances(points, centroids).argmin(1)
        for k in range(len(centroids)):
            if (codes == k).any():
                centroids[k] = np.float64(points)[codes == k].mean(0)
            else:
                emptied = True
    return centroids, emptied
