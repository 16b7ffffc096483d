"""Levels on paths: the rule of the states, the best path, compiled as in numpy; the gain on Gaussian weights."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp.kernels import dependent, entropy, rans
from cluscomp.kernels.dependent import NEXT, Lengths, best_path, lengths_of, round_on_paths, symbols_of
from cluscomp.kernels.loading import native
from cluscomp.solve.water_filling import Curvature, WaterFilling

compiled = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")


def level(number, state):
    """By the rule of the standard."""
    return 2 * number - (state & 1) * int(np.sign(number))


def followed(numbers_O):
    """The levels that numbers stand for."""
    state, found = 0, []
    for number in numbers_O:
        found.append(level(number, state))
        state = NEXT[state, number & 1]
    return found


def some_lengths(seed, tables):
    return np.random.default_rng(seed).uniform(0.5, 9, (2 * tables, 256)).astype(np.float32)


def problem(rows, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wanted_RO = torch.randn(rows, outputs, generator=generator)
    factor_RR = torch.eye(rows) + 0.2 * torch.randn(rows, rows, generator=generator)
    rows_R = np.arange(rows, dtype=np.uint8) % 2
    return (
        wanted_RO,
        factor_RR,
        torch.rand(rows, generator=generator) + 0.05,
        Lengths(rows_R, some_lengths(seed, tables=2)),
    )


def in_numpy(call, *given_, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dependent, "native", None)
        patch.setattr(rans, "native", None)
        return call(*given_, **more)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-63, 63), min_size=1, max_size=60))
def test_numbers_and_levels_are_each_other(numbers_O):
    levels_1O = np.array([followed(numbers_O)], np.int8)
    for symbols_1O, _ in (symbols_of(levels_1O), in_numpy(symbols_of, levels_1O)):
        assert symbols_1O.tolist() == [numbers_O]


@pytest.mark.parametrize("price", [0.0, 0.4, 3.0])
def test_the_path_is_the_best_of_all(price):
    """Against all paths of five numbers, none larger than 3."""
    rng = np.random.default_rng(0)
    bits_2K = rng.uniform(0.5, 4, (2, 256))
    for u_O in rng.normal(size=(8, 5)) * 1.5:

        def cost(numbers_O, u_O=u_O):
            state, total = 0, 0.0
            for number, u in zip(numbers_O, u_O):
                total += (u - level(number, state)) ** 2 + price * bits_2K[state & 1, number + 128]
                state = NEXT[state, number & 1]
            return total

        best = min(map(cost, itertools.product(range(-3, 4), repeat=5)))
        found_1O, _ = symbols_of(best_path(u_O, bits_2K, price)[None])
        far = price > 1  # then a number two steps nearer to 0 may be better, which is not looked at
        assert cost(found_1O[0].tolist()) <= best * (1.3 if far else 1) + 1e-9


@compiled
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 99))
def test_the_compiled_rows_are_those_of_numpy(rows, outputs, seed):
    wanted_RO, factor_RR, steps_R, lengths = problem(rows, outputs, seed)
    steps_R[0] = 1e-4  # levels above 127
    found = round_on_paths(wanted_RO.clone(), factor_RR, steps_R, lengths)
    for ours, theirs in zip(found, in_numpy(round_on_paths, wanted_RO.clone(), factor_RR, steps_R, lengths)):
        assert torch.equal(ours, theirs)


def test_rows_follow_the_rule_and_hand_their_errors_on():
    wanted_RO, factor_RR, steps_R, lengths = problem(7, 40)
    levels_RO, scales_R, errors_RO = round_on_paths(wanted_RO.clone(), factor_RR, steps_R, lengths)
    left_RO = wanted_RO.double()
    for i in range(7):
        symbols_1O, _ = symbols_of(levels_RO[i : i + 1].numpy())
        assert followed(symbols_1O[0].tolist()) == levels_RO[i].tolist()
        level_O = levels_RO[i].double()
        assert float(scales_R[i]) == pytest.approx(float(level_O @ left_RO[i] / level_O.square().sum()), rel=1e-3)
        error_O = (left_RO[i] - level_O * float(scales_R[i])) / factor_RR[i, i].double()
        torch.testing.assert_close(errors_RO[i].double(), error_O, rtol=1e-4, atol=1e-5)
        left_RO[i + 1 :] -= factor_RR[i, i + 1 :, None].double() * error_O


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 99))
def test_streams_of_levels_come_back_compiled_as_in_numpy(inputs, outputs, seed):
    spread_I1 = np.random.default_rng(seed).uniform(0.1, 20, (inputs, 1))
    numbers_IO = (np.random.default_rng(seed).normal(size=(inputs, outputs)) * spread_I1).clip(-63, 63).astype(int)
    levels_IO = torch.tensor([followed(row) for row in numbers_IO.tolist()], dtype=torch.int8)
    stream = entropy.write(levels_IO, dependent=True)
    assert torch.equal(entropy.read(stream, inputs, outputs, dependent=True), levels_IO)
    assert torch.equal(in_numpy(entropy.write, levels_IO, dependent=True), stream)
    assert torch.equal(in_numpy(entropy.read, stream, inputs, outputs, dependent=True), levels_IO)


@pytest.mark.parametrize("without", [False, True])
def test_damage_of_a_stream_of_levels_does_no_harm(without, monkeypatch):
    if without:
        monkeypatch.setattr(rans, "native", None)
    levels_IO = torch.tensor([followed([1, 0, -2, 3, 1] * 8)] * 20, dtype=torch.int8)
    stream, found = entropy.write(levels_IO, dependent=True), 0
    for place in range(0, len(stream), 9 if without else 1):
        changed = stream.clone()
        changed[place] ^= 5
        try:
            assert entropy.read(changed, 20, 40, dependent=True).shape == (20, 40)
        except ValueError:
            found += 1
    assert found > 0


def test_lengths_are_the_logarithms_of_shares():
    levels_IO = torch.tensor([[0, 0, 2, 0] * 200, [4] * 800], dtype=torch.int8)
    found = lengths_of(levels_IO, np.array([0, 1], np.uint8))
    symbols_IO, odd_IO = symbols_of(levels_IO.numpy())
    row = symbols_IO[0][odd_IO[0] == 0]
    for number in set(row.tolist()):
        assert found.bits_TK[0, 128 + number] == pytest.approx(-np.log2((row == number).mean()), abs=0.01)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.0755), (3, 0.0185), (4, 0.0046)])
def test_gaussian_weights_keep_less_error_than_whole_numbers_of_equal_bits(bits, most):
    """All bits counted. The limit of rate-distortion theory is 4^-bits: 0.0625, 0.0156, 0.0039."""
    weight_OI = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    curvature, errors = Curvature(torch.eye(256)), {}
    for one in (False, True):
        filling = WaterFilling(weight_OI, curvature, dependent=one, scaled_outputs=False, refits=1)
        stored = filling.stored(bits + 16 / 512)  # the scales of inputs are no part of the rate here
        errors[one] = float((stored(torch.float32) - weight_OI).detach().square().mean())
    assert errors[True] < most and errors[True] < 0.86 * errors[False]
