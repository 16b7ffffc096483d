"""QTIP: stored bits under any limit, error against other methods and the rate limit, sizes that tiles do not divide."""

from dataclasses import replace

import pytest
import torch
from layers import correlated, heavy_tailed, made_by, planned, relative_error, statistic_of

from cluscomp.forms.stored import build, described
from cluscomp.kernels.trellis import code_values
from cluscomp.methods.qtip import Qtip
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.solve.along_outputs import best_factors, output_error

SMALL = Qtip(
    bits=2.0, width=None, state_bits=9, code="3inst", tile_outputs=16, tile_inputs=16, scales="matrix", damping=0.01
)


def made(method, weight_OI, x_TI):
    return made_by(method, weight_OI, statistic_of(x_TI, "moment"), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales", ["matrix", "output"])
@pytest.mark.parametrize("bits", [1.0, 1.7, 2.0, 3.5, 4.0, 8.0])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (64, 48)], ids=str)
def test_a_limit_is_met_and_spent(shape, bits, scales):
    form = planned(replace(SMALL, bits=bits, scales=scales), *shape)
    weights = shape[0] * shape[1]
    spent = sum(form.ledger().values())
    assert bits * weights - 256 - (bits == 8.0) * 2**20 < spent <= bits * weights
    assert form.inner.bits(**form.inner.spec())["codes"] == 8 * form.inner.codes.numel()


def test_by_hand_the_width_is_stored_with_a_scale_and_a_seed():
    form = planned(replace(SMALL, bits=None, width=2), 576, 1536)
    assert form.ledger() == {"seeds": 64, "codes": 2 * 576 * 1536, "scales": 16}


@pytest.mark.parametrize("bits, most", [(1.0, 0.37), (2.0, 0.105), (2.5, 0.07), (3.0, 0.032)])
def test_uncorrelated_inputs_lose_what_gaussian_numbers_do(bits, most):
    weight_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    form = made(replace(SMALL, bits=bits), weight_OI, 8 * torch.eye(64))
    lost = float((form(torch.float32).detach() - weight_OI).square().mean() / weight_OI.square().mean())
    assert 4.0**-bits < lost < most  # 9 bits of state; one tile of 16 has a bit less


@pytest.mark.parametrize("shape", [(33, 47), (5, 70), (16, 16)], ids=str)
@pytest.mark.parametrize("tile", [(16, 16), (32, 1), (8, 4)], ids=str)
def test_tiles_may_reach_beyond_the_weight(shape, tile):
    weight_OI, x_TI = correlated(*shape)
    method = replace(SMALL, bits=None, width=3, tile_outputs=tile[0], tile_inputs=tile[1])
    form = made(method, weight_OI, x_TI)
    assert form.spec() == planned(method, *shape).spec()
    assert relative_error(weight_OI, form(torch.float32).detach(), x_TI) < 0.06
    again = build(described(form))
    again.load_state_dict(form.state_dict())
    assert torch.equal(again(torch.float32), form(torch.float32))


def test_it_loses_far_less_than_rounding_and_less_with_tiles_of_few_inputs():
    weight_OI, x_TI = heavy_tailed()
    rounding = RoundToNearest(bits=2.0, width=None, group=None, symmetric=False)
    forms = {
        "rtn": made_by(rounding, weight_OI, None, torch.Generator()),
        "square": made(SMALL, weight_OI, x_TI),
        "tall": made(replace(SMALL, tile_outputs=64, tile_inputs=4), weight_OI, x_TI),
        "outputs": made(replace(SMALL, scales="output"), weight_OI, x_TI),
    }
    lost = {name: relative_error(weight_OI, form(torch.float32).detach(), x_TI) for name, form in forms.items()}
    assert lost["tall"] < lost["square"] < 0.25 * lost["rtn"]
    assert lost["outputs"] < 1.35 * lost["square"]  # scales take 1/16 bit of a weight here


def test_the_result_follows_from_the_seed():
    weight_OI, x_TI = correlated(32, 32)
    first, same, other = (
        made_by(SMALL, weight_OI, statistic_of(x_TI, "moment"), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(first.seed, other.seed)


@pytest.mark.parametrize("scales", ["matrix", "output"])
def test_a_weight_of_zeros_and_one_too_small_for_16_bits_become_zero(scales):
    for weight_OI in (torch.zeros(32, 32), torch.randn(32, 32) * 1e-9):
        form = made(replace(SMALL, bits=3.0, scales=scales), weight_OI, torch.eye(32))
        assert not bool(form(torch.float32).any())


@pytest.mark.parametrize("number", [1, 6])
def test_scales_are_those_of_least_output_error(number):
    weight_OI, x_TI = correlated(6, 5)
    dense_OI, moment_II = weight_OI + 0.5 * torch.randn_like(weight_OI), x_TI.T @ x_TI
    factors_C = best_factors(weight_OI, dense_OI, moment_II, number)
    least = output_error(factors_C[:, None] * dense_OI - weight_OI, moment_II)
    for change in (0.99, 1.01):
        assert least <= output_error(change * factors_C[:, None] * dense_OI - weight_OI, moment_II)


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"bits": None}, {"width": 2}, {"tile_outputs": 3, "tile_inputs": 5}):
        with pytest.raises(ValueError, match=r"method\.(width|tile_outputs)"):
            replace(SMALL, **wrong)
    with pytest.raises(ValueError, match="out of reach"):
        planned(replace(SMALL, bits=1.0), 3, 5)
    assert float(code_values(9, "1mad", torch.device("cpu")).std()) == pytest.approx(1, abs=0.05)
