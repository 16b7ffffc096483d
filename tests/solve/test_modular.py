"""Which units of a block stay, and what makes up for the others: against least squares, SVD and loops by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import correlated

from cluscomp.solve.modular import common, energy, nystrom, pairs, units, widths


def relu_mlp(width=256, inputs=64, tokens=8192):
    """What an MLP's units are for inputs that hang together, (T, W), and the layer that reads them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x_TI = normal(tokens, inputs) * torch.linspace(0, -6, inputs).exp() @ torch.linalg.qr(normal(inputs, inputs)).Q
    z_TW = (x_TI @ (normal(inputs, width) / inputs**0.5) + 0.02 * normal(width)).relu()
    return z_TW, normal(inputs, width) / width**0.5


def test_half_the_units_of_a_relu_mlp_with_the_correction_lose_little_of_what_dropping_them_does():
    z_TW, weight_OW = relu_mlp()
    moment_WW = z_TW.T @ z_TW / len(z_TW)
    kept_K = units(moment_WW, 128, 0.01)
    y_TO = z_TW @ weight_OW.T
    corrected = (z_TW[:, kept_K].double() @ nystrom(weight_OW, moment_WW, kept_K).T - y_TO).square().sum()
    dropped = (z_TW[:, kept_K] @ weight_OW[:, kept_K].T - y_TO).square().sum()
    assert 0 < corrected <= 0.15 * dropped


def test_the_correction_is_least_squares_and_the_scores_are_ridge_leverages():
    weight_OW, z_TW = correlated(20, 32)
    moment_WW = z_TW.T @ z_TW / len(z_TW)
    kept_K = units(moment_WW, 12, 0.1)
    assert kept_K.tolist() == sorted({*kept_K.tolist()})
    ridge_WW = 0.1 * moment_WW.diagonal().mean() * torch.eye(32)
    scores_W = (moment_WW @ torch.linalg.inv(moment_WW + ridge_WW)).diagonal()
    assert {*kept_K.tolist()} == {*scores_W.topk(12).indices.tolist()}
    best_KO = torch.linalg.lstsq(z_TW[:, kept_K].double(), (z_TW @ weight_OW.T).double()).solution
    torch.testing.assert_close(nystrom(weight_OW, moment_WW, kept_K), best_KO.T, rtol=1e-3, atol=1e-3)
    assert units(moment_WW, 32, 0.1).tolist() == list(range(32))
    assert nystrom(weight_OW, torch.zeros(32, 32), kept_K).isfinite().all()  # behind units that are never on


def test_common_dimensions_of_values_lose_what_the_smallest_singular_values_hold():
    """Of two query heads that share a key head: the tail of the spectrum of both outputs, as their values see it."""
    outputs_MD, v_TD = correlated(2 * 24, 16)
    moment_DD = (v_TD.T @ v_TD / len(v_TD)).double()
    making_KD, again_DK = common(moment_DD, outputs_MD, 6)
    spectrum = torch.linalg.svdvals(outputs_MD.double() @ torch.linalg.cholesky(moment_DD)).square()
    lost = energy(outputs_MD.double() @ (torch.eye(16) - again_DK @ making_KD), moment_DD)
    torch.testing.assert_close(lost, float(spectrum[6:].sum()), rtol=1e-4, atol=0)
    torch.testing.assert_close(energy(outputs_MD, moment_DD), float(spectrum.sum()), rtol=1e-4, atol=0)
    making_DD, whole_DD = common(moment_DD, outputs_MD, 16)
    torch.testing.assert_close(whole_DD @ making_DD, torch.eye(16, dtype=torch.float64))


def test_pairs_count_by_both_their_dimensions_and_all_heads_of_their_key_head():
    generator = torch.Generator().manual_seed(0)
    queries_ND, keys_GD = torch.rand(6, 8, generator=generator), torch.rand(2, 8, generator=generator)
    expected = [
        sum(float(queries_ND[n, d] * keys_GD[n // 3, d]) for n in range(6) for d in (pair, pair + 4))
        for pair in range(4)
    ]
    torch.testing.assert_close(pairs(queries_ND, keys_GD), torch.tensor(expected).double())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(20, 100), st.floats(0.01, 10))
def test_widths_keep_the_mean_stay_within_bounds_and_follow_influence(influences, left, temperature):
    found = widths(influences, 100, left, temperature)
    assert sum(found) == left * len(influences) and all(20 <= each <= 100 for each in found)
    in_order = [kept for _, kept in sorted(zip(influences, found))]
    assert all(less <= more + 1 for less, more in zip(in_order, in_order[1:]))  # but for rounding
    assert {*widths(influences, 100, left, 1e9)} == {left}


def test_what_goes_is_a_softmax_of_influence():
    gone = [1000 - kept for kept in widths([0.1, 0.2, 0.4], 1000, 700, 0.2)]
    parts = [math.exp(-each / 0.2) for each in (0.1, 0.2, 0.4)]
    assert gone == pytest.approx([900 * part / sum(parts) for part in parts], abs=1)


@pytest.mark.parametrize("together", [3, 100])
def test_fewer_tokens_than_units_that_stay_are_enough_for_the_correction(together):
    """Units that hang together, as float32 sums have them: their moment is singular but for rounding."""
    generator = torch.Generator().manual_seed(0)
    x_TW = torch.randn(64, 384, generator=generator) + together * torch.randn(64, 1, generator=generator)
    weight_OW, kept_K = torch.randn(16, 384, generator=generator), torch.arange(256)
    moment_WW = x_TW.T @ x_TW / len(x_TW)
    left = energy(torch.cat([nystrom(weight_OW, moment_WW, kept_K), torch.zeros(16, 128)], 1) - weight_OW, moment_WW)
    assert left < 1e-3 * energy(weight_OW, moment_WW)
