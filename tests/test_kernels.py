"""Packing against numpy.packbits, the nearest centroid against float64 brute force, the gather against autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.lloyd import distances

from cluscomp.kernels.codes import code_bits, gather, pack, packed_bytes, unpack
from cluscomp.kernels.nearest import nearest, nearest_plain


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 16), length=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_packing_is_numpys_little_endian_bit_stream(bits, length, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, length)
    packed = pack(torch.from_numpy(codes), bits)
    padded = np.pad(codes, (0, -length % 8))
    stream = (padded[:, None] >> np.arange(bits) & 1).astype(np.uint8).ravel()
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(stream, bitorder="little"))
    assert len(packed) == packed_bytes(length, bits)
    np.testing.assert_array_equal(unpack(packed, bits, length).numpy(), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_the_largest_code_of_each_width_survives(bits):
    codes = torch.full((17,), (1 << bits) - 1)
    assert torch.equal(unpack(pack(codes, bits), bits, 17).long(), codes)


@pytest.mark.parametrize("bad", [[0, 4], [-1, 0]])
def test_a_code_that_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match="do not fit 2 bits"):
        pack(torch.tensor(bad), 2)


def test_a_stream_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="5 bytes for 9 codes of 3 bits"):
        unpack(torch.zeros(5, dtype=torch.uint8), 3, 9)


@pytest.mark.parametrize("size, bits", [(2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (65500, 16), (65536, 16)])
def test_code_bits_by_hand(size, bits):
    assert code_bits(size) == bits


@pytest.mark.parametrize("size", [0, 1, 65537])
def test_codebooks_of_impossible_size_are_refused(size):
    with pytest.raises(ValueError, match=f"{size} centroids"):
        code_bits(size)


@pytest.mark.parametrize("search", [nearest, nearest_plain])
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
    found = search(torch.from_numpy(points), torch.from_numpy(centroids))
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), distances(points, centroids).argmin(1))  # argmin: the first


@pytest.mark.parametrize("search", [nearest, nearest_plain])
@pytest.mark.parametrize("dim", [1, 2, 4, 6, 9, 16, 33])
def test_ties_of_repeated_centroids_across_search_blocks(search, dim):
    generator = torch.Generator().manual_seed(dim)
    distinct = torch.randint(-20, 21, (700, dim), generator=generator).float()
    points = torch.randint(-20, 21, (300, dim), generator=generator).float()
    expected = distances(points, distinct).argmin(1)
    np.testing.assert_array_equal(search(points, torch.cat([distinct] * 3)).numpy(), expected)


@pytest.mark.parametrize("search", [nearest, nearest_plain])
@settings(max_examples=40, deadline=None)
@given(num_points=st.integers(1, 400), size=st.integers(1, 90), dim=st.integers(1, 17), seed=st.integers(0, 2**32 - 1))
def test_real_points_go_to_the_nearest_centroid(search, num_points, size, dim, seed):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((num_points, dim), dtype=np.float32)
    centroids = rng.standard_normal((size, dim), dtype=np.float32)
    found = search(torch.from_numpy(points), torch.from_numpy(centroids)).numpy()
    table = distances(points, centroids)
    excess = table[np.arange(num_points), found] - table.min(1)
    assert excess.max() <= 1e-5 * (1 + np.square(points).sum(1).max())  # float32 rounding of the squares


def test_the_fast_search_and_its_reference_agree_over_several_chunks():
    generator = torch.Generator().manual_seed(0)
    points, centroids = (torch.randint(-9, 10, (size, 4), generator=generator).float() for size in (9000, 4000))
    assert torch.equal(nearest(points, centroids), nearest_plain(points, centroids))  # 4194 points a chunk


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gather_and_its_gradient_are_those_of_plain_indexing(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator).to(dtype)
    codes = torch.tensor([4, 0, 0, 2, 4, 4, 1], dtype=torch.int32)  # code 3 is never used
    upstream = torch.randn(7, 3, generator=generator).to(dtype)
    ours, plain = (values.clone().requires_grad_() for _ in range(2))
    result, expected = gather(ours, codes), plain[codes.long()]
    assert torch.equal(result, expected)
    result.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance)
    assert not ours.grad[3].any()
