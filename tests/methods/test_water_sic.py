"""WaterSIC against the theory of entropy-coded uniform quantisers, against one step for all, and at its limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from layers import correlated, heavy_tailed, made_by, planned, relative_error, statistic_of

from cluscomp.kernels.entropy import planned as coded
from cluscomp.kernels.integers import round_rows
from cluscomp.methods.water_sic import WaterSic
from cluscomp.solve.along_outputs import damped, inverse_factor, output_error
from cluscomp.solve.layer import Layer
from cluscomp.solve.water_filling import Curvature, WaterFilling

PLAIN = {"allocation": "uniform", "floor": 0.85, "damping": 0.01, "scaled_outputs": False, "refits": 1}
ONCE = {"scaled_outputs": False, "refits": 1}


def gaussian(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def bits_of(form):
    return sum(form.ledger().values()) / (form.out_features * form.in_features)


def uniform_quantiser(step):
    """Entropy and squared error of a Gaussian number rounded to whole steps and scaled best: by integration."""
    x = np.linspace(-9, 9, 40_001)
    density = np.exp(-x * x / 2)
    density /= density.sum()
    z = np.rint(x / step)
    shares = np.bincount((z - z.min()).astype(int), weights=density)
    scale = (density * z * x).sum() / (density * z * z).sum()
    shares = shares[shares > 0]
    return -(shares * np.log2(shares)).sum(), (density * (x - scale * z) ** 2).sum()


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0])
def test_gaussian_weights_come_to_the_curve_of_entropy_coded_rounding(bits):
    weight_OI = gaussian(512, 256)
    form = WaterFilling(weight_OI, Curvature(torch.eye(256)), **ONCE).stored(bits).requires_grad_(False)
    error = float((form(torch.float32) - weight_OI).square().mean() / weight_OI.square().mean())
    steps = np.geomspace(0.2, 4, 100)
    curve = np.array([uniform_quantiser(step) for step in steps])
    spent = 8 * len(form.stream) / weight_OI.numel()
    expected = np.interp(spent, curve[::-1, 0], curve[::-1, 1])
    assert error == pytest.approx(expected, rel=0.02)
    assert 1 < error / 4**-spent < math.pi * math.e / 6 * 1.02  # between the bound of all codes and a quarter of a bit


def one_step(weight_OI, moment_II, most):
    """Output error of feedback with one step for all inputs and a scale for each, at no fewer than `most` bits."""
    order_I = moment_II.diagonal().argsort(descending=True)
    sorted_II = moment_II[order_I][:, order_I]
    factor_II = inverse_factor(sorted_II).float()
    low, high = 1e-4, 1e2
    for _ in range(20):
        step = math.sqrt(low * high)
        weight_IO = weight_OI.T[order_I].contiguous()
        numbers_IO, scales_I, _ = round_rows(weight_IO, factor_II, torch.full((len(factor_II),), step))
        low, high = (low, step) if coded(numbers_IO).bits <= most else (step, high)
        if coded(numbers_IO).bits > most:
            error_IO = numbers_IO * scales_I[:, None] - weight_OI.T[order_I]
            found = output_error(error_IO.T, sorted_II)
    return found


@pytest.mark.parametrize("much, spread", [(1, 0.5), (0.6, 3.0)])
def test_water_filling_beats_one_step_for_all_inputs(much, spread):
    inputs, outputs = 96, 300
    generator = torch.Generator().manual_seed(0)
    turn_II = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q
    stretch_I = (spread * torch.linspace(-1, 1, inputs)).exp()
    moment_II = (turn_II * stretch_I) @ turn_II.T
    moment_II = moment_II * stretch_I.sqrt() * stretch_I.sqrt()[:, None]
    weight_OI = gaussian(outputs, inputs, 1)
    form = WaterFilling(weight_OI, Curvature(moment_II), scaled_outputs=False, refits=0).stored(2.3)
    error = output_error(form(torch.float32) - weight_OI, moment_II)
    assert error < much * one_step(weight_OI, moment_II, 8 * len(form.stream))


@pytest.mark.parametrize("bits", [0.7, 1.0, 2.0, 3.3, 5.0])
@pytest.mark.parametrize("scaled_outputs", [False, True])
def test_nearly_all_bits_are_spent_and_none_above(bits, scaled_outputs):
    weight_OI, x_TI = heavy_tailed(256)
    method = WaterSic(states=1, bits=bits, **PLAIN | {"scaled_outputs": scaled_outputs})
    form = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator())
    assert bits - 0.01 <= bits_of(form) <= bits
    assert bits - 0.01 <= bits_of(planned(method, 256, 256)) <= bits
    form.check()


def test_more_bits_leave_less_error_and_refitting_less_still():
    weight_OI, x_TI = heavy_tailed(256)
    moment_II = damped(statistic_of(x_TI).matrix_II, 0.01)
    errors = []
    for bits in (1.5, 2.0, 2.5, 4.0):
        form = WaterFilling(weight_OI, Curvature(moment_II), **ONCE).stored(bits)
        errors.append(relative_error(weight_OI, form(torch.float32), x_TI))
    assert all(b < 0.75 * a for a, b in zip(errors, errors[1:]))
    plain = WaterFilling(weight_OI, Curvature(moment_II), **ONCE | {"refits": 0}).stored(2.0)
    assert errors[1] < relative_error(weight_OI, plain(torch.float32), x_TI)


def test_the_scales_are_those_of_least_squares():
    """No scale, of input or output, can be moved to leave less."""
    weight_OI, x_TI = correlated(40, 24)
    moment_II = damped(statistic_of(x_TI).matrix_II, 0.01)
    form = WaterFilling(weight_OI, Curvature(moment_II), scaled_outputs=False, refits=1).stored(3.0)
    scales_I = form.scales.detach().double().requires_grad_(True)
    error_OI = form.numbers().double().T * scales_I - weight_OI
    loss = ((error_OI @ moment_II.double()) * error_OI).sum()
    (slope_I,) = torch.autograd.grad(loss, scales_I)
    assert float((slope_I * scales_I.detach()).abs().max()) < 0.02 * float(loss.detach())


def test_weights_that_are_nothing_and_inputs_nobody_uses_are_no_obstacle():
    weight_OI, x_TI = correlated(30, 20)
    x_TI[:, 3] = 0
    weight_OI[:, 5] = 0
    for seen in (x_TI, x_TI[:1], torch.zeros(2, 20)):
        for weight in (weight_OI, torch.zeros_like(weight_OI)):
            form = made_by(WaterSic(states=1, bits=3.0, **PLAIN), weight, statistic_of(seen), torch.Generator())
            dense_OI = form(torch.float32)
            assert bool(dense_OI.isfinite().all()) and bits_of(form) <= 3
    assert not dense_OI.any()


def test_too_few_bits_are_refused_with_what_is_left():
    weight_OI, x_TI = correlated(30, 20)
    method = WaterSic(states=1, bits=0.5, **PLAIN)
    for make in (
        lambda: planned(method, 30, 20),
        lambda: made_by(method, weight_OI, statistic_of(x_TI), torch.Generator()),
    ):
        with pytest.raises(ValueError, match=r"-0\.033 bits a weight are left for its numbers: too few"):
            make()


def block():
    """Layers of one block: two that read one input, one of which is far larger along one direction."""
    found = {}
    for number, (outputs, inputs) in enumerate([(96, 128), (64, 128), (160, 96)]):
        weight_OI, x_TI = correlated(outputs, inputs, number)
        x_TI[:, 0] *= 4**number
        found[f"layer {number}"] = Layer(weight_OI, number, statistic_of(x_TI), torch.Generator())
    return found


def test_bits_shared_out_leave_less_relative_error_within_the_limit():
    layers = block()

    def made(allocation):
        method = WaterSic(states=1, bits=2.0, **PLAIN | {"allocation": allocation, "floor": 0.5})
        return {name: form for some in method.compress(dict(layers)) for name, form in some.stored.items()}

    def errors(forms):
        return sum(
            layers[name].weight_OI.numel()
            * output_error(form(torch.float32) - layers[name].weight_OI, layers[name].seen.matrix_II)
            / output_error(layers[name].weight_OI, layers[name].seen.matrix_II)
            for name, form in forms.items()
        )

    filled, uniform = made("fill"), made("uniform")
    weights = sum(layer.weight_OI.numel() for layer in layers.values())
    spent = sum(bits for form in filled.values() for bits in form.ledger().values()) / weights
    assert 1.97 < spent <= 2
    assert max(map(bits_of, uniform.values())) <= 2 < max(map(bits_of, filled.values()))
    assert errors(filled) < 0.95 * errors(uniform)


def test_a_menu_offers_only_what_can_be_set():
    method = WaterSic(states=1, bits=0.6, **PLAIN | {"floor": 0.0})
    for menu in method.offers(block()):
        assert min(replace(method, **option.settings).bits for option in menu.options) < 0.3


def test_a_menu_tells_what_its_options_leave():
    layers = block()
    method = WaterSic(states=1, bits=2.0, **PLAIN)
    for menu in method.offers(layers):
        layer = layers[menu.names[0]]
        moment_II = damped(layer.seen.matrix_II, 0.01)
        first, *others = menu.options
        assert first.settings == {"bits": 2.0} and all(1.7 <= one.settings["bits"] <= 3 for one in others)
        for option in (first, others[0], others[-1]):
            form = made_by(
                WaterSic(states=1, **PLAIN | {"bits": option.settings["bits"]}), layer.weight_OI, layer.seen, None
            )
            error = output_error(form(torch.float32).detach() - layer.weight_OI, moment_II)
            left = error / output_error(layer.weight_OI, moment_II)
            assert option.damage / layer.weight_OI.numel() == pytest.approx(left, rel=0.2)
