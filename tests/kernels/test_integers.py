"""Rows rounded one after the other: the compiled kernel, plain torch and the rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp.kernels import integers
from cluscomp.kernels.integers import leading_bits, round_rows
from cluscomp.kernels.loading import native

compiled = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")


def problem(rows, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wanted_RO = torch.randn(rows, outputs, generator=generator)
    factor_RR = torch.eye(rows) + 0.2 * torch.randn(rows, rows, generator=generator)
    return wanted_RO, factor_RR, torch.rand(rows, generator=generator) + 0.05


def in_torch(*given_):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "native", None)
        return round_rows(*given_)


@compiled
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 200), st.integers(0, 99))
def test_the_compiled_rows_are_those_of_torch(rows, outputs, seed):
    wanted_RO, factor_RR, steps_R = problem(rows, outputs, seed)
    steps_R[0] = 1e-4  # numbers above 127
    found = round_rows(wanted_RO.clone(), factor_RR, steps_R)
    for ours, theirs in zip(found, in_torch(wanted_RO.clone(), factor_RR, steps_R)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("search", [round_rows, in_torch])
def test_the_rows_follow_the_rule(search):
    wanted_RO, factor_RR, steps_R = problem(7, 40)
    numbers_RO, scales_R, errors_RO = search(wanted_RO.clone(), factor_RR, steps_R)
    left_RO = wanted_RO.double()
    for i in range(7):
        number_O = (left_RO[i] / float(steps_R[i])).round()
        assert (numbers_RO[i] - number_O).abs().sum() <= 1  # one that was nearly half way
        number_O = numbers_RO[i].double()
        scale = float(number_O @ left_RO[i] / number_O.square().sum())
        assert float(scales_R[i]) == pytest.approx(scale, rel=1e-3)
        error_O = (left_RO[i] - number_O * float(scales_R[i])) / factor_RR[i, i].double()
        torch.testing.assert_close(errors_RO[i].double(), error_O, rtol=1e-4, atol=1e-5)
        left_RO[i + 1 :] -= factor_RR[i, i + 1 :, None].double() * error_O


def test_large_numbers_get_a_larger_step_and_zeros_keep_theirs():
    wanted_RO = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]])
    numbers_RO, scales_R, errors_RO = round_rows(wanted_RO, torch.eye(2), torch.tensor([1e-9, 0.5]))
    assert numbers_RO.tolist() == [[42, -127, 85], [0, 0, 0]]
    assert float(scales_R[1]) == 0.5 and not errors_RO[1].any()


def test_scales_are_numbers_of_16_bits():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(leading_bits(values), values.half().float())


@compiled
def test_sizes_that_do_not_fit_are_refused():
    wanted_RO, factor_RR, steps_R = problem(3, 5)
    good = [wanted_RO, factor_RR, steps_R, torch.empty(3, 5, dtype=torch.int8), torch.empty(3), torch.empty(3, 5)]
    native.round_rows(*good)
    for place in (1, 2, 3, 4, 5):
        wrong = torch.zeros(*[n + 1 for n in good[place].shape], dtype=good[place].dtype)
        with pytest.raises(ValueError, match="sizes differ"):
            native.round_rows(*[*good[:place], wrong, *good[place + 1 :]])
