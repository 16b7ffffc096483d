"""Low-rank binary: rank and bits, signs by hand, scales against least squares, descent against every single sign."""

import math
from dataclasses import replace

import pytest
import torch
from layers import correlated, heavy_tailed, made_by, planned, relative_error, statistic_of

from cluscomp.forms.signs import SignWeight
from cluscomp.forms.stored import build, described
from cluscomp.methods.low_rank_binary import LowRankBinary
from cluscomp.plan import dry
from cluscomp.plan.places import Place
from cluscomp.solve import signs
from cluscomp.solve.along_outputs import damped, output_error
from cluscomp.solve.layer import Layer

METHOD = LowRankBinary(bits=1.0, rank=None, allocation="uniform", floor=0.5, rounds=10, descents=1, damping=0.01)


def made(method, weight_OI, x_TI, seed=0):
    return made_by(method, weight_OI, statistic_of(x_TI, "moment"), torch.Generator().manual_seed(seed))


def lost(method, weight_OI, x_TI):
    return relative_error(weight_OI, made(method, weight_OI, x_TI)(torch.float32).detach(), x_TI)


def started(outputs, inputs, rank, rounds=0):
    """A weight, the damped moment of its inputs, and factors that splitting gives."""
    weight_OI, x_TI = correlated(outputs, inputs)
    moment_II = damped(statistic_of(x_TI).matrix_II, 0.01)
    factors = signs.split(weight_OI, signs.Inputs(moment_II), rank, rounds, torch.Generator().manual_seed(0))
    return weight_OI, moment_II, factors


def error(weight_OI, moment_II, factors):
    """tr(E H E^T) from the definition, in float64."""
    outputs, ranks, inputs = (
        torch.diag(scales.double()) for scales in (factors.outputs_O, factors.ranks_R, factors.inputs_I)
    )
    dense_OI = outputs @ factors.left_OR.double() @ ranks @ factors.right_RI.double() @ inputs
    error_OI = weight_OI.double() - dense_OI
    return float(torch.einsum("oi,ij,oj->", error_OI, moment_II.double(), error_OI))


# what is stored


@pytest.mark.parametrize("shape", [(7, 5), (33, 47), (64, 17), (1, 9)], ids=str)
def test_signs_come_back_exactly_with_the_scales_of_their_output_and_input(shape):
    generator = torch.Generator().manual_seed(0)
    signs_OI = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    outputs_O, inputs_I = (torch.rand(size, generator=generator).half().float() for size in shape)
    form = SignWeight.from_signs(signs_OI, outputs_O, inputs_I)
    assert torch.equal(form.signs(torch.float32), signs_OI)
    assert torch.equal(form(torch.float32), signs_OI * outputs_O[:, None] * inputs_I)
    assert len(form.codes) == math.ceil(signs_OI.numel() / 8)
    assert torch.equal(SignWeight.from_signs(signs_OI, outputs_O, None)(torch.float32), signs_OI * outputs_O[:, None])
    assert torch.equal(SignWeight.from_signs(signs_OI, None, inputs_I)(torch.float32), signs_OI * inputs_I)
    with pytest.raises(ValueError, match="signs without a scale"):
        SignWeight.from_signs(signs_OI, None, None)


@pytest.mark.parametrize("bits", [0.55, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (576, 1536), (133, 347)], ids=str)
def test_the_rank_is_the_largest_within_the_limit(shape, bits):
    form = planned(replace(METHOD, bits=bits), *shape)
    rank, weights = form.left.in_features, shape[0] * shape[1]
    ledger = form.ledger()
    assert ledger["codes"] == rank * sum(shape) and ledger["scales"] == 16 * (sum(shape) + rank)
    assert sum(ledger.values()) <= bits * weights
    assert sum(planned(replace(METHOD, bits=None, rank=rank + 1), *shape).ledger().values()) > bits * weights


def test_ranks_at_1_bit_are_those_by_hand():
    """(O I - 16 (O + I)) / (O + I + 16) of q, k and up of SmolLM2-135M."""
    ranks = [signs.rank_within(1.0, *shape) for shape in ((576, 576), (192, 576), (1536, 576))]
    assert ranks == [268, 125, 399]


@pytest.mark.parametrize("shape", [(33, 47), (64, 17), (32, 24)], ids=str)
@pytest.mark.parametrize("bits", [2.0, 3.5])
def test_what_is_stored_is_what_was_planned(shape, bits):
    weight_OI, x_TI = correlated(*shape)
    form = made(replace(METHOD, bits=bits), weight_OI, x_TI)
    assert form.spec() == planned(replace(METHOD, bits=bits), *shape).spec()
    assert relative_error(weight_OI, form(torch.float32).detach(), x_TI) < 0.6
    again = build(described(form))
    again.load_state_dict(form.state_dict())
    assert torch.equal(again(torch.float32), form(torch.float32))


def test_the_scales_of_both_factors_are_of_one_size():
    """Which stages that train them with one learning rate need."""
    weight_OI, x_TI = heavy_tailed(128)
    form = made(METHOD, weight_OI, x_TI)
    parts = [*form.left.scales.detach().float().split([128, form.left.in_features]), form.right.scales.detach().float()]
    sizes = [float(part.square().mean().sqrt()) for part in parts]
    assert max(sizes) < 1.01 * min(sizes)


# what is solved for


def test_signs_with_scales_leave_what_theory_says_of_gaussian_numbers():
    numbers_AB = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    left_AB = numbers_AB - signs.Nearest(numbers_AB).dense()
    assert float(left_AB.square().mean() / numbers_AB.square().mean()) == pytest.approx(1 - 2 / math.pi, abs=0.005)


def test_scales_are_those_of_least_squares():
    weight_OI, moment_II, factors = started(20, 12, 6)
    fitted = signs.refitted(weight_OI, moment_II, factors)
    assert error(weight_OI, moment_II, fitted) < error(weight_OI, moment_II, factors)
    root_II = torch.linalg.cholesky(moment_II.double())
    wanted = (weight_OI.double() @ root_II).flatten()
    dense_OI = (factors.scaled_left_OR @ factors.right_RI).double()
    columns = torch.stack([torch.outer(dense_OI[:, i], root_II[i]).flatten() for i in range(12)], 1)
    expected_I = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(fitted.inputs_I.double(), expected_I, rtol=1e-3, atol=1e-3)
    left_OR, right_RI = (
        (factors.left_OR * factors.outputs_O[:, None]).double(),
        fitted.scaled_right_RI.double() @ root_II,
    )
    columns = torch.stack([torch.outer(left_OR[:, k], right_RI[k]).flatten() for k in range(6)], 1)
    expected_R = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(fitted.ranks_R.double(), expected_R, rtol=1e-3, atol=1e-3)
    rows_OI = (factors.left_OR * fitted.ranks_R @ fitted.scaled_right_RI).double() @ root_II
    expected_O = [
        torch.linalg.lstsq(row_I[:, None], wanted_I[:, None]).solution[0, 0]
        for row_I, wanted_I in zip(rows_OI, wanted.view(20, -1))
    ]
    torch.testing.assert_close(fitted.outputs_O.double(), torch.stack(expected_O), rtol=1e-3, atol=1e-3)


def test_turning_signs_never_raises_the_error_and_ends_where_none_can_turn(monkeypatch):
    monkeypatch.setattr(signs, "TOGETHER", 1)  # then no sign waits for others that might turn with it
    monkeypatch.setattr(signs, "BATCH", 5)
    weight_OI, moment_II, factors = started(14, 11, 9)
    factors = signs.refitted(weight_OI, moment_II, factors)
    errors = [error(weight_OI, moment_II, factors)]
    for _ in range(12):
        factors = signs.flipped(weight_OI, moment_II, factors)
        errors.append(error(weight_OI, moment_II, factors))
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:])) and errors[1] < 0.9 * errors[0]
    assert errors[-1] == errors[-2]
    for name in ("left_OR", "right_RI"):
        for place in range(getattr(factors, name).numel()):
            turned = getattr(factors, name).clone()
            turned.view(-1)[place] *= -1
            assert error(weight_OI, moment_II, replace(factors, **{name: turned})) >= errors[-1] * (1 - 1e-5)


@pytest.mark.parametrize("together", [4, 64])
def test_signs_that_turn_together_never_raise_the_error(monkeypatch, together):
    monkeypatch.setattr(signs, "TOGETHER", together)
    weight_OI, moment_II, factors = started(60, 40, 30)
    before = error(weight_OI, moment_II, factors)
    for _ in range(4):
        factors = signs.flipped(weight_OI, moment_II, factors)
        assert error(weight_OI, moment_II, factors) <= before * (1 + 1e-6)
        before = error(weight_OI, moment_II, factors)


def test_splitting_beats_its_start_rounds_help_and_descent_too():
    weight_OI, x_TI = heavy_tailed(128)
    start, short, long = (lost(replace(METHOD, rounds=n, descents=0), weight_OI, x_TI) for n in (0, 10, 40))
    assert long < 0.97 * short and short < 0.7 * start
    assert lost(METHOD, weight_OI, x_TI) < short


def test_more_bits_lose_less():
    weight_OI, x_TI = heavy_tailed(128)
    errors = [lost(replace(METHOD, bits=bits), weight_OI, x_TI) for bits in (0.6, 1.0, 1.5, 2.5)]
    assert all(b < 0.85 * a for a, b in zip(errors, errors[1:]))


def test_the_second_moment_is_worth_knowing():
    weight_OI, x_TI = heavy_tailed(128)
    blind = made_by(METHOD, weight_OI, statistic_of(torch.eye(128)), torch.Generator().manual_seed(0))
    assert lost(METHOD, weight_OI, x_TI) < 0.7 * relative_error(weight_OI, blind(torch.float32).detach(), x_TI)


def test_weights_that_are_nothing_and_inputs_nobody_uses_are_no_obstacle():
    weight_OI, x_TI = correlated(30, 20)
    x_TI[:, 3] = 0
    weight_OI[:, 5] = 0
    weight_OI[7] = 0
    for seen in (x_TI, x_TI[:1], torch.zeros(2, 20)):
        for weight in (weight_OI, torch.zeros_like(weight_OI)):
            dense_OI = made(replace(METHOD, bits=3.0), weight, seen)(torch.float32)
            assert bool(dense_OI.isfinite().all())
    assert not dense_OI.any()


# bits shared out


def block():
    """Layers of one block: two that read one input, one of low rank, one with an input far larger than others."""
    weight_OI, x_TI = heavy_tailed(96)
    seen = statistic_of(x_TI, "moment")
    low_OI = weight_OI[:, :6] @ weight_OI[:6] * 10 + 0.1 * weight_OI
    other_OI, y_TI = correlated(160, 64)
    return {
        "a": Layer(weight_OI, 0, seen, torch.Generator().manual_seed(0)),
        "b": Layer(low_OI, 0, seen, torch.Generator().manual_seed(1)),
        "c": Layer(other_OI, 1, statistic_of(y_TI, "moment"), torch.Generator().manual_seed(2)),
    }


def test_bits_shared_out_leave_less_relative_error_within_the_limit():
    layers = block()
    weights = sum(layer.weight_OI.numel() for layer in layers.values())
    found = {}
    for allocation in ("uniform", "fill"):
        method = replace(METHOD, bits=1.5, allocation=allocation)
        forms = {name: form for some in method.compress(dict(layers)) for name, form in some.stored.items()}
        spent = sum(bits for form in forms.values() for bits in form.ledger().values())
        assert spent <= 1.5 * weights
        found[allocation] = sum(
            layer.weight_OI.numel()
            * output_error(forms[name](torch.float32).detach() - layer.weight_OI, layer.seen.matrix_II)
            / output_error(layer.weight_OI, layer.seen.matrix_II)
            for name, layer in layers.items()
        )
    assert found["fill"] < 0.98 * found["uniform"]


def test_a_block_whose_bits_are_shared_out_is_planned_at_its_limit():
    places = {name: Place(*layer.weight_OI.shape, layer.input) for name, layer in block().items()}
    tried = dry.compress(replace(METHOD, bits=1.5, allocation="fill"), places, torch.float32)
    spent = sum(bits for form in tried.stored.values() for bits in form.ledger().values())
    assert (
        not tried.exact
        and 1.4 < spent / sum(place.out_features * place.in_features for place in places.values()) <= 1.5
    )


def test_a_menu_has_the_limit_first_and_nothing_below_the_floor():
    for menu in replace(METHOD, bits=1.5).offers(block()):
        first, *others = menu.options
        assert first.settings == {"bits": 1.5} and all(0.75 <= one.settings["bits"] <= 2.5 for one in others)
        by_bits = sorted(menu.options, key=lambda option: option.bits)
        assert all(a.damage > b.damage for a, b in zip(by_bits, by_bits[1:]))


@pytest.mark.parametrize("outputs, inputs, bits", [(1024, 1024, 0.06), (96, 288, 0.25), (33, 65, 0.9)])
def test_a_menu_near_the_least_bits_offers_only_what_can_be_had(outputs, inputs, bits):
    layer = Layer(torch.randn(outputs, inputs), 0, statistic_of(torch.randn(40, inputs)), torch.Generator())
    (menu,) = replace(METHOD, bits=bits, rounds=1).offers({"layer": layer})
    for option in menu.options:
        assert planned(replace(METHOD, **option.settings), outputs, inputs).left.in_features >= 1
    least = signs.least_bits(outputs, inputs)
    assert signs.rank_within(least, outputs, inputs) == 1
    with pytest.raises(ValueError, match="out of reach"):
        signs.rank_within(math.nextafter(least, 0) - 1e-9, outputs, inputs)


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"bits": None}, {"rank": 2}):
        with pytest.raises(ValueError, match=r"method\.rank"):
            replace(METHOD, **wrong)
    with pytest.raises(ValueError, match=r"out of reach for a 3 x 5 matrix: a rank takes 24 bits"):
        planned(METHOD, 3, 5)
