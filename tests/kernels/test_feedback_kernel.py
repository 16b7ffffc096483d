"""Codes chosen round by round: the compiled kernel against plain torch and against the rule, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluscomp.kernels.feedback import Feedback
from cluscomp.kernels.loading import native

compiled = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")
ISAS = ["base", "avx2", "avx512"]


def problem(rounds, outputs, size, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-outputs // dim)
    wanted_RP = torch.zeros(rounds, groups * dim)
    wanted_RP[:, :outputs] = torch.randn(rounds, outputs, generator=generator)
    factor_RR = torch.eye(rounds) + 0.1 * torch.randn(rounds, rounds, generator=generator)
    before_RP = torch.randn(rounds, groups * dim, generator=generator)
    return wanted_RP, factor_RR, before_RP, torch.randn(size, dim, generator=generator)


def in_torch(centroids_KD, outputs, *given):
    plain = Feedback(centroids_KD, outputs)
    plain._index = None
    return plain.choose(*given)


def by_rule(wanted_RP, factor_RR, before_RP, centroids_KD, outputs):
    """In float64, with no order of sums to keep: close, not equal."""
    wanted, factor, books = wanted_RP.double(), factor_RR.double(), centroids_KD.double()
    base = wanted if before_RP is None else before_RP.double()
    codes, errors = [], []
    for i in range(len(wanted)):
        vectors = wanted[i].view(-1, books.shape[1])
        codes.append(torch.cdist(vectors, books).argmin(1))
        errors.append(((base[i] - books[codes[-1]].flatten()) / factor[i, i])[:outputs])
        for j in range(i + 1, len(wanted)):
            wanted[j, :outputs] = wanted[j, :outputs] - factor[i, j] * errors[-1]
    return torch.stack(codes).int(), torch.stack(errors)


@compiled
@given(
    st.integers(1, 20), st.integers(1, 300), st.sampled_from([1, 2, 16, 17, 300]), st.integers(1, 20), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_the_compiled_rounds_are_those_of_torch(rounds, outputs, size, dim, has_before, seed):
    wanted_RP, factor_RR, before_RP, centroids_KD = problem(rounds, outputs, size, dim, seed)
    before_RP = before_RP if has_before else None
    expected = in_torch(centroids_KD, outputs, wanted_RP.clone(), factor_RR, before_RP)
    for threads in (1, 3):
        left_RP = wanted_RP.clone()
        found = Feedback(centroids_KD, outputs, threads).choose(left_RP, factor_RR, before_RP)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert torch.equal(left_RP[:, outputs:], wanted_RP[:, outputs:])  # the padding is left alone


@pytest.mark.parametrize("has_before", [False, True])
def test_the_rounds_follow_the_rule(has_before):
    wanted_RP, factor_RR, before_RP, centroids_KD = problem(6, 10, 9, 3)
    before_RP = before_RP if has_before else None
    codes_RG, errors_RO = by_rule(wanted_RP, factor_RR, before_RP, centroids_KD, 10)
    for search in (lambda *given: Feedback(centroids_KD, 10).choose(*given), lambda *g: in_torch(centroids_KD, 10, *g)):
        found = search(wanted_RP.clone(), factor_RR, before_RP)
        assert torch.equal(found[0], codes_RG) and found[0].shape == (6, 4)
        torch.testing.assert_close(found[1].double(), errors_RO, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize(("size", "dim"), [(4096, 4), (4096, 9), (64, 2)])
def test_all_instruction_sets_agree(size, dim):
    wanted_RP, factor_RR, _, centroids_KD = problem(8, 205, size, dim)
    index, found = native.Index(centroids_KD, 1), []
    for isa in ISAS:
        codes_RG = torch.empty(8, wanted_RP.shape[1] // dim, dtype=torch.int32)
        errors_RO = torch.empty(8, 205)
        try:
            native.feedback(index, wanted_RP.clone(), None, factor_RR, codes_RG, errors_RO, 1, isa)
        except ValueError as error:
            assert "this machine has no" in str(error)
        else:
            found.append((codes_RG, errors_RO))
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0]))


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e15])
def test_a_value_that_is_not_finite_is_named(value):
    wanted_RP, factor_RR, _, centroids_KD = problem(3, 7, 5, 2)
    wanted_RP[1, 4] = value
    with pytest.raises(ValueError, match=r"wanted\[1, 4\] is .*; every value must be finite"):
        Feedback(centroids_KD, 7).choose(wanted_RP, factor_RR)


@compiled
def test_sizes_that_do_not_fit_are_refused():
    wanted_RP, factor_RR, before_RP, centroids_KD = problem(3, 7, 5, 2)
    index, codes_RG, errors_RO = native.Index(centroids_KD, 1), torch.empty(3, 4, dtype=torch.int32), torch.empty(3, 7)
    good = [wanted_RP, before_RP, factor_RR, codes_RG, errors_RO]
    native.feedback(index, *good, 1)
    for position, wrong in enumerate(
        [
            torch.empty(3, 9),
            torch.empty(2, 8),
            torch.empty(3, 2),
            torch.empty(3, 5, dtype=torch.int32),
            torch.empty(3, 9),
        ]
    ):
        with pytest.raises(ValueError, match="sizes differ"):
            native.feedback(index, *[*good[:position], wrong, *good[position + 1 :]], 1)
    with pytest.raises(ValueError, match="threads"):
        native.feedback(index, *good, 0)


@compiled
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_centroids_that_are_not_finite_are_refused(wrong):
    centroids_KD = torch.randn(600, 2)
    centroids_KD[7, 1] = wrong
    with pytest.raises(ValueError, match="centroids must be finite"):
        Feedback(centroids_KD, 8)
