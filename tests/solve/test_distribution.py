"""How entries and codes are distributed, by hand and against scipy's kurtosis."""

import math

import pytest
import torch
from scipy.stats import entropy, kurtosis

from cluscomp.solve.distribution import of_codes, of_entries


def test_kurtosis_is_scipys():
    for seed in range(3):
        weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)) ** (seed + 1) + seed
        assert of_entries(weight)["kurtosis"] == pytest.approx(
            kurtosis(weight.double().numpy(), axis=None) + 3, rel=1e-4
        )


def test_outliers_by_hand():
    weight = torch.zeros(100, 100)
    weight[:50], weight[50:] = 1.0, -1.0
    weight[0, 0] = 50.0  # the one entry of ten thousand beyond six standard deviations
    assert of_entries(weight)["outliers"] == pytest.approx(1e-4)
    for equal in (torch.full((3, 4), 2.0), torch.full((700, 900), 0.1)):  # of the latter the mean is rounded
        assert of_entries(equal) == {"kurtosis": 0.0, "outliers": 0.0}


def test_the_weight_is_left_as_it_was():
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    of_entries(weight)
    assert torch.equal(weight, before)


def test_use_of_centroids_by_hand():
    """100 codes over 8 centroids: mean use 12.5, so a centroid named once is rare; three are never named."""
    codes = torch.tensor([[0] * 33 + [1] * 33 + [2] * 32 + [3] + [4]], dtype=torch.int32)
    found = of_codes(codes, 8)
    assert found["centroids"] == 8 and found["dead"] == 3 / 8 and found["rare"] == 2 / 8
    assert found["entropy"] == pytest.approx(entropy([33, 33, 32, 1, 1], base=2))


def test_of_codebooks_that_are_added_the_means_count():
    even, one = torch.arange(16).repeat(4), torch.zeros(64, dtype=torch.long)
    found = of_codes(torch.stack([even, one]), 16)
    assert found["entropy"] == pytest.approx(math.log2(16) / 2) and found["dead"] == 15 / 32 and found["rare"] == 0
