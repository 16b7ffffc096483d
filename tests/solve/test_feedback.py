"""The nearest centroid against float64 brute force, on ties above all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.lloyd import distances

from cluscomp.kernels.lloyd import assign
from cluscomp.kernels.lloyd_torch import assign_faiss


@pytest.mark.parametrize("search", [assign, assign_faiss])
@settings(max_examples=60, deadline=None)
@given(
    num_points=st.sampled_from([1, 7, 19, 20, 21, 300]),  # faiss changes its path at 20 queries
    size=st.sampled_from([1, 2, 15, 16, 17, 130]),
    dim=st.integers(1, 20),
    levels=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_ties_on_an_integer_grid_go_to_the_lowest_index(search, num_points, size, dim, levels, seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(-levels, levels + 1, (num_points, dim)).astype(np.float32)
    centroids = rng.integers(-levels, levels + 1, (size, dim)).astype(np.float32)
    found = search(torch.from_numpy(points), torch.from_numpy(centroids))[0]
    np.testing.assert_array_equal(found.numpy(), distances(points, centroids).argmin(1))  # argmin: the first


@pytest.mark.parametrize("search", [assign, assign_faiss])
@pytest.mark.parametrize("dim", [1, 2, 4, 6, 9, 16, 33])
def test_ties_of_repeated_centroids_across_search_blocks(search, dim):
    generator = torch.Generator().manual_seed(dim)
    distinct = torch.randint(-20, 21, (700, dim), generator=generator).float()
    points = torch.randint(-20, 21, (300, dim), generator=generator).float()
    expected = distances(points, distinct).argmin(1)
    np.testing.assert_array_equal(search(points, torch.cat([distinct] * 3))[0].numpy(), expected)


@pytest.mark.parametrize("search", [assign, assign_faiss])
@settings(max_examples=40, deadline=None)
@given(num_points=st.integers(1, 400), size=st.integers(1, 90), dim=st.integers(1, 17), seed=st.integers(0, 2**32 - 1))
def test_real_points_go_to_the_nearest_centroid(search, num_points, size, dim, seed):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((num_points, dim), dtype=np.float32)
    centroids = rng.standard_normal((size, dim), dtype=np.float32)
    found = search(torch.from_numpy(points), torch.from_numpy(centroids))[0].numpy()
    table = distances(points, centroids)
    excess = table[np.arange(num_points), found] - table.min(1)
    assert excess.max() <= 1e-5 * (1 + np.square(points).sum(1).max())  # float32 rounding of the squares


def test_the_fast_search_and_its_reference_agree_over_several_chunks():
    generator = torch.Generator().manual_seed(0)
    points, centroids = (torch.randint(-9, 10, (size, 4), generator=generator).float() for size in (9000, 4000))
    assert torch.equal(assign(points, centroids)[0], assign_faiss(points, centroids)[0])
