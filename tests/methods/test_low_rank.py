"""Low rank: the best factors there are, the bits they take, and one ranking of singular values over a model."""

from dataclasses import replace

import pytest
import torch
from layers import correlated, made_by, relative_error, statistic_of

from cluscomp.methods.low_rank import LowRankFactors
from cluscomp.solve.allocate import share_out
from cluscomp.solve.layer import Layer
from cluscomp.solve.low_rank import bits, within

METHOD = LowRankFactors(
    bits=None, rank=6, width=16, group=8, weighting="none", allocation="fill", floor=0.0, damping=1e-4
)


def stored(method, weight_OI, seen=None):
    return made_by(method, weight_OI, seen, torch.Generator())


def test_factors_leave_what_the_smallest_singular_values_hold_of_the_weight_or_of_the_outputs():
    weight_OI, x_TI = correlated(24, 32)
    seen = statistic_of(x_TI, "moment")
    plain, by_output = (stored(replace(METHOD, weighting=way), weight_OI, seen) for way in ("none", "moment"))
    values = torch.linalg.svdvals(weight_OI.double()).square()
    lost = (plain(torch.float32) - weight_OI).double().square().sum()
    torch.testing.assert_close(lost, values[6:].sum(), rtol=1e-3, atol=0)
    outputs = torch.linalg.svdvals((x_TI @ weight_OI.T).double()).square()
    best = float(outputs[6:].sum() / outputs.sum())
    errors = [relative_error(weight_OI, form(torch.float32).detach(), x_TI) for form in (plain, by_output)]
    assert best <= errors[1] * (1 + 1e-3) <= 1.02 * best < errors[0]


def test_with_all_directions_it_is_the_weight():
    weight_OI, x_TI = correlated(24, 32)
    for weighting in ("none", "moment"):
        whole = stored(replace(METHOD, rank=24, weighting=weighting), weight_OI, statistic_of(x_TI, "moment"))
        torch.testing.assert_close(whole(torch.float32).detach(), weight_OI, rtol=0, atol=1e-2)


def test_sizes_are_shares_of_the_dense_numbers_within_a_rank_and_never_above():
    """ACIP's ratios: 0.9, 0.7 and 0.5 of a dense matrix of 16 bits; on grids of 4 bits a quarter, scales beside."""
    for share in (0.9, 0.7, 0.5):
        rank = within(16 * share, 576, 1536, 16, 64)
        assert rank == int(share * 576 * 1536 / (576 + 1536))
        assert 0.99 * share <= bits(576, 1536, rank, 16, 64) / (16 * 576 * 1536) <= share
    assert bits(576, 1536, 200, 4, 64) == 4 * 200 * (576 + 1536) + 16 * (576 * 4 + 200 * 24)
    form = stored(replace(METHOD, width=4), correlated(24, 32)[0])
    assert sum(form.ledger().values()) == bits(24, 32, 6, 4, 8)
    assert relative_error(*[correlated(24, 32)[0], form(torch.float32).detach()], correlated(24, 32)[1]) < 1


def test_over_several_layers_it_is_one_ranking_of_what_directions_add():
    """Of two layers of one shape and worth: the kept ones are those with the largest shares of their layer."""
    method = replace(METHOD, rank=None, bits=8.0)
    spectra = [torch.logspace(0, -scale, 16) for scale in (0.5, 2.0)]
    weights = {
        str(n): torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(n))).Q * spectrum
        for n, spectrum in enumerate(spectra)
    }
    layers = {name: Layer(weight_OI, int(name), None, torch.Generator()) for name, weight_OI in weights.items()}
    menus = list(method.offers(layers))
    assert menus[0].options[0].settings == {"bits": None, "rank": 4}
    picked = [option.settings["rank"] for option in share_out(menus, 8.0)]
    shares = [(float(value), number) for number, s in enumerate(spectra) for value in s.square() / s.square().sum()]
    best = [number for _, number in sorted(shares)[-8:]]
    assert sum(picked) == 8 and picked == [best.count(0), best.count(1)] and picked[0] > picked[1]
    made = {name: one.chosen["rank"] for found in [method.compress(layers)] for one in found for name in one.stored}
    assert [made["0"], made["1"]] == picked


def test_what_cannot_be_is_refused():
    weight_OI, _ = correlated(24, 32)
    with pytest.raises(ValueError, match=r"method\.rank=25: a weight of 24 x 32 has 24"):
        stored(replace(METHOD, rank=25), weight_OI)
    with pytest.raises(ValueError, match=r"bits=1.0 is out of reach for 24 x 32: rank 1 takes 1\.167"):
        stored(replace(METHOD, rank=None, bits=1.0), weight_OI)
    with pytest.raises(ValueError, match=r"method\.width=12: numbers have up to 8 bits, or 16"):
        replace(METHOD, width=12)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        replace(METHOD, rank=0)


def test_what_does_not_fit_16_bits_is_told_with_the_layers_name():
    layers = {"mlp.up": Layer(torch.full((8, 8), 1e5), 0, None, torch.Generator())}
    with pytest.raises(ValueError, match=r"^mlp\.up: a scale of size 1e\+05"):
        list(METHOD.compress(layers))
