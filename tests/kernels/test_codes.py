"""Packing against numpy.packbits, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp.kernels import codes as kernel
from cluscomp.kernels.codes import code_bits, pack, packed_bytes, unpack


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 16), length=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_packing_is_numpys_little_endian_bit_stream(compiled, bits, length, seed):
    if not compiled:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "native", None)
            return check_packing(bits, length, seed)
    return check_packing(bits, length, seed)


def check_packing(bits, length, seed):
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
