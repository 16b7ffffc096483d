"""Paths through trellises: against all paths there are, the plain version, the paper's formulas and the rate limit."""

import itertools
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp.kernels.counting import Count
from cluscomp.kernels.loading import native
from cluscomp.kernels.trellis import (
    best_paths,
    best_paths_reference,
    code_values,
    pack_paths,
    path_bytes,
    path_numbers,
    unpack_paths,
)

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_paths(state_bits, width, length, tail_biting):
    """Every path of states, from every first state by every step; of tail-biting ones those whose ends meet."""
    mask, shared = 2**state_bits - 1, state_bits - width
    for first in range(2**state_bits):
        for steps in itertools.product(range(2**width), repeat=length - 1):
            path = [first]
            for step in steps:
                path.append((path[-1] << width | step) & mask)
            if not tail_biting or path[-1] & 2**shared - 1 == first >> width:
                yield path


@pytest.mark.parametrize("state_bits, width, length", [(3, 1, 6), (4, 2, 4), (5, 2, 3), (4, 3, 3)])
def test_a_free_path_has_the_least_error_of_all_and_a_closed_one_at_least_a_near_one(state_bits, width, length):
    values_N = normal(2**state_bits, seed=1)
    targets_ST = normal(6, length, seed=2)
    ways = [best_paths, best_paths_reference] if native is not None else [best_paths_reference]
    for tail_biting in (False, True):
        paths_PT = torch.tensor([*all_paths(state_bits, width, length, tail_biting)])
        least_S = (values_N[paths_PT] - targets_ST[:, None]).square().sum(2).amin(1)
        for way in ways:
            states_ST = way(targets_ST, values_N, width, tail_biting=tail_biting)
            error_S = (values_N[states_ST.long()] - targets_ST).square().sum(1)
            known = {tuple(path) for path in paths_PT.tolist()}
            assert all(tuple(path) in known for path in states_ST.tolist())
            if tail_biting:  # two passes need not find the best one
                assert bool((error_S >= least_S - 1e-5).all())
            else:
                torch.testing.assert_close(error_S, least_S, rtol=1e-5, atol=1e-5)


@compiled
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 99), st.booleans(), st.booleans())
def test_the_compiled_paths_are_those_of_torch(state_bits, width, seed, tail_biting, ties):
    width = min(width, state_bits - 1)
    values_N, targets_ST = normal(2**state_bits, seed=seed), normal(5, 16, seed=seed + 100)
    if ties:
        values_N, targets_ST = values_N.round(), targets_ST.round()
    expected = best_paths_reference(targets_ST, values_N, width, tail_biting=tail_biting)
    for threads in (1, 3):
        found = best_paths(targets_ST, values_N, width, tail_biting=tail_biting, threads=threads)
        assert torch.equal(found, expected)


@compiled
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_all_instruction_sets_agree(width):
    values_N, targets_ST, found = code_values(9, "3inst", CPU), normal(4, 64), []
    for isa in ("base", "avx2", "avx512"):
        states_ST = torch.empty(4, 64, dtype=torch.int32)
        try:
            native.best_paths(targets_ST, values_N, width, True, states_ST, 1, isa)
        except ValueError as error:
            assert "this machine has no" in str(error)
        else:
            found.append(states_ST)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("state_bits, width, length", [(9, 1, 16), (12, 2, 256), (16, 3, 32), (12, 5, 8), (12, 8, 4)])
def test_packed_paths_take_the_steps_bits_and_come_back(state_bits, width, length):
    bits_ST = torch.randint(2, (3, length * width), generator=torch.Generator().manual_seed(0))
    first_T = torch.arange(length) * width
    places_TL = (first_T[:, None] + torch.arange(state_bits)) % (length * width)  # windows that go round
    states_ST = (bits_ST[:, places_TL] << torch.arange(state_bits - 1, -1, -1)).sum(2).int()
    packed_SB = pack_paths(states_ST, state_bits, width)
    assert packed_SB.shape == (3, length * width // 8) == (3, path_bytes(length, width))
    assert torch.equal(unpack_paths(packed_SB, state_bits, width), states_ST)
    values_N = normal(2**state_bits)
    for threads in (1, 3):
        assert torch.equal(path_numbers(packed_SB, values_N, width, threads=threads), values_N[states_ST.long()])
    with pytest.raises(ValueError, match="no whole bytes"):
        path_bytes(7, width if width < 8 else 1)


def half(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def test_the_codes_are_the_papers():
    for name, by_rule in {
        "1mad": lambda s: (sum(((34038481 * s + 76625530) % 2**32).to_bytes(4, "little")) - 510) / 147.8,
        "3inst": lambda s: sum(
            half(part ^ int.from_bytes(struct.pack("<e", 0.922), "little"))
            for part in struct.unpack("<HH", (((89226354 * s + 64248484) % 2**32) & 0x8FFF8FFF).to_bytes(4, "little"))
        ),
    }.items():
        values_N = code_values(12, name, CPU)
        assert values_N.tolist() == pytest.approx([by_rule(state) for state in range(4096)], rel=1e-6)
        assert abs(float(values_N.mean())) < 0.01


@compiled
def test_two_bits_leave_little_of_gaussian_numbers():
    targets_ST = normal(64, 256)
    values_N = code_values(12, "3inst", CPU)
    scale = 1.02 / float(values_N.std())
    dense_ST = values_N[best_paths(targets_ST / scale, values_N, 2).long()] * scale
    error = float((dense_ST - targets_ST).square().mean() / targets_ST.square().mean())
    assert 0.0625 < error <= 0.075  # the limit of any code; 0.073 here, K-means of 4 numbers has 0.093
    free_ST = values_N[best_paths(targets_ST / scale, values_N, 2, tail_biting=False).long()] * scale
    assert float((free_ST - targets_ST).square().sum()) < float((dense_ST - targets_ST).square().sum())


def test_what_cannot_be_is_refused():
    values_N = normal(16)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            best_paths(torch.tensor([[0.0, wrong, 0.0, 0.0]]), values_N, 2)
    if native is not None:
        states_ST = torch.empty(1, 4, dtype=torch.int32)
        for sizes, message in (((15, 2, 4), "power of two"), ((16, 4, 4), "width"), ((16, 2, 5), "sizes differ")):
            count, width, length = sizes
            with pytest.raises(ValueError, match=message):
                native.best_paths(normal(1, length), normal(count), width, True, states_ST, 1)
        with pytest.raises(ValueError, match="at least one state"):
            best_paths(normal(1, 1), values_N, 2)


def test_without_numbers_work_is_reported():
    with Count() as count:
        states_ST = best_paths(torch.empty(3, 8, device="meta"), torch.empty(16, device="meta"), 2)
    assert states_ST.shape == (3, 8) and states_ST.is_meta
    assert count.work.distances == 2 * 3 * 8 * 16
