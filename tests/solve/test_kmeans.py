"""K-means against its own definition (plain Lloyd in float64), faiss' and scikit-learn's, and by hand."""

from itertools import pairwise

import faiss
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.lloyd import distances, lloyd
from sklearn.cluster import KMeans

from cluscomp.solve.kmeans import Recipe, kmeans


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def cluster(points, num_centroids, iterations, seed=0):
    return kmeans(torch.from_numpy(points), num_centroids, paper(iterations), seeded(seed))


def paper(iterations):
    return Recipe(iterations, "random_points", over_relaxation=1.0, move_centroids=False)


def start(points, num_centroids, seed=0):
    """The distinct points a clustering of this seed starts from."""
    drawn = int(torch.randint(1 << 62, (), generator=seeded(seed)))
    return points[np.random.default_rng(drawn).choice(len(points), num_centroids, replace=False, shuffle=False)]


def gaussian(num_points, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((num_points, dim), dtype=np.float32)


problems = given(
    num_points=st.integers(2, 120), share=st.floats(0, 1), dim=st.integers(1, 6), seed=st.integers(0, 2**20)
)


def size_of(num_points, share):
    """K from 2 to N."""
    return 2 + round(share * (num_points - 2))


@settings(max_examples=40, deadline=None)
@problems
def test_codes_are_nearest_and_inertia_is_their_error(num_points, share, dim, seed):
    points = gaussian(num_points, dim, seed)
    found = cluster(points, size_of(num_points, share), 3, seed)
    table = distances(points, found.centroids_KD.numpy())
    assert found.centroids_KD.dtype == torch.float32
    assert (table[np.arange(num_points), found.codes_N.numpy()] - table.min(1)).max() <= 1e-4
    assert found.inertia[-1] == pytest.approx(table.min(1).sum(), rel=1e-4, abs=1e-4)


@settings(max_examples=40, deadline=None)
@problems
def test_each_iteration_is_lloyds(num_points, share, dim, seed):
    points = gaussian(num_points, dim, seed)
    size = size_of(num_points, share)
    expected, emptied = lloyd(points, start(points, size, seed), 3)
    assume(not emptied)
    # A point on a border may fall on either side in float32: the error is compared, not the centroids.
    error = distances(points, expected).min(1).sum()
    assert cluster(points, size, 3, seed).inertia[-1] == pytest.approx(error, rel=1e-2, abs=1e-3)


@settings(max_examples=25, deadline=None)
@problems
def test_inertia_never_grows_with_the_iterations(num_points, share, dim, seed):
    points = gaussian(num_points, dim, seed)
    size = size_of(num_points, share)
    assume(not lloyd(points, start(points, size, seed), 6)[1])
    errors = [cluster(points, size, iterations, seed).inertia[-1] for iterations in range(1, 7)]
    assert all(after <= before * (1 + 1e-5) + 1e-6 for before, after in pairwise(errors))


def test_at_the_fixpoint_each_centroid_is_the_mean_of_its_points():
    points = gaussian(300, 2)
    found = cluster(points, 8, 200)
    codes = found.codes_N.numpy()
    means_KD = np.stack([points[codes == k].astype(np.float64).mean(0) for k in range(8)])
    np.testing.assert_allclose(found.centroids_KD.numpy(), means_KD, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(num_points=st.integers(2, 60), dim=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_as_many_centroids_as_distinct_points_leave_no_error(num_points, dim, seed):
    points = np.random.default_rng(seed).permutation(num_points * dim).reshape(num_points, dim).astype(np.float32)
    found = cluster(points, num_points, 2, seed)
    assert found.inertia[-1] == 0
    assert sorted(found.codes_N.tolist()) == list(range(num_points))


def test_four_points_by_hand():
    points = np.float32([[0, 0], [0, 2], [10, 0], [10, 2]])
    seed = next(seed for seed in range(99) if set(start(points, 2, seed)[:, 0]) == {0, 10})  # one point on either side
    found = cluster(points, 2, 1, seed)
    assert sorted(found.centroids_KD.tolist()) == [[0, 1], [10, 1]]
    assert found.inertia[-1] == 4
    assert found.codes_N[0] == found.codes_N[1] != found.codes_N[2] == found.codes_N[3]


@pytest.mark.parametrize("dim, size", [(2, 64), (4, 40), (9, 16)])
def test_as_good_as_faiss_from_the_same_start(dim, size):
    points = gaussian(3000, dim)
    theirs = faiss.Kmeans(dim, size, niter=20, max_points_per_centroid=10**6)
    theirs.train(points, init_centroids=start(points, size))
    error = distances(points, theirs.centroids).min(1).sum()
    assert cluster(points, size, 20).inertia[-1] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_as_good_as_scikit_learn_from_the_same_start(iterations):
    points = gaussian(2000, 3)
    theirs = KMeans(32, init=start(points, 32), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(points)
    found = cluster(points, 32, iterations)
    assert found.inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-3)
    if iterations == 1:  # before a point on a border can have moved anything
        ours, expected = (rows[np.lexsort(rows.T)] for rows in (found.centroids_KD.numpy(), theirs.cluster_centers_))
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_seed_decides_and_nothing_else():
    points = gaussian(2000, 4)
    torch.manual_seed(1)
    first = cluster(points, 50, 5, seed=3)
    torch.manual_seed(2)
    np.random.seed(2)
    again, other = cluster(points, 50, 5, seed=3), cluster(points, 50, 5, seed=4)
    assert torch.equal(first.centroids_KD, again.centroids_KD) and torch.equal(first.codes_N, again.codes_N)
    assert first.inertia[-1] == again.inertia[-1]
    assert not torch.equal(first.centroids_KD, other.centroids_KD)


def test_the_number_of_threads_changes_nothing():
    points = gaussian(20_000, 4)
    results = []
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)
            results.append(cluster(points, 128, 2))
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
    one, two = results
    assert torch.equal(one.centroids_KD, two.centroids_KD) and torch.equal(one.codes_N, two.codes_N)


def test_empty_clusters_are_filled():
    points = np.repeat(np.float32([[0.0, 1.0], [5.0, -5.0], [9.0, 3.0]]), 40, axis=0)
    points += np.random.default_rng(0).uniform(-1e-2, 1e-2, points.shape).astype(np.float32)
    points[0], points[40], points[80] = [0, 1], [5, -5], [9, 3]
    repeated = np.concatenate([points, np.zeros((200, 2), np.float32)])  # most starts are the same point
    _, emptied = lloyd(repeated, start(repeated, 40), 1)
    assert emptied, "the example must have empty clusters"
    found = cluster(repeated, 40, 20)
    assert len(found.codes_N.unique()) > len(np.unique(start(repeated, 40), axis=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_points_of_any_float_type_are_clustered_in_float32(dtype):
    points = torch.from_numpy(gaussian(50, 2)).to(dtype)
    found = kmeans(points, 5, paper(2), seeded(0))
    expected = kmeans(points.float(), 5, paper(2), seeded(0))
    assert found.centroids_KD.dtype == torch.float32
    assert torch.equal(found.centroids_KD, expected.centroids_KD)


@pytest.mark.parametrize(
    "change, size, iterations, message",
    [
        (None, 11, 1, "11 centroids for 10 sub-vectors"),
        (None, 1, 1, "1 centroids for 10 sub-vectors"),
        (float("nan"), 2, 1, "must be finite"),
        (float("inf"), 2, 1, "must be finite"),
        (3e38, 2, 1, "."),  # finite, but its square is not
    ],
)
def test_bad_input_is_refused_with_its_numbers(change, size, iterations, message):
    points = gaussian(10, 3)
    if change is not None:
        points[:5] = change
    with pytest.raises(ValueError, match=message) as caught:
        cluster(points, size, iterations)
    assert "bincount" not in str(caught.value) and "negative" not in str(caught.value)
