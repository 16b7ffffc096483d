"""Closed forms for sharing bits out: what OPQ and Collaborative Compression say of them, on their own curves."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp.solve.allocate import Menu, Option, share_out, share_out_by_curves
from cluscomp.solve.curves import FALL, Curve, fitted, of_first, rates

FORMULAS = ("opq", "marginal")
wide = st.builds(
    lambda weights, start, fall: Curve(weights, start, fall, 0.5, 8.0),
    st.integers(1, 10_000), st.floats(-10, 10), st.floats(0.3, 3),
)  # fmt: skip


def damage(curves, bits):
    return sum(math.exp(curve.start - curve.fall * each) for curve, each in zip(curves, bits))


@settings(max_examples=40, deadline=None)
@given(st.lists(wide, min_size=1, max_size=6), st.floats(0.5, 8))
def test_no_pair_can_trade_bits_and_do_less_damage_and_the_limit_is_met(curves, bits):
    found = rates(curves, bits)
    total = sum(curve.weights for curve in curves)
    spent = sum(curve.weights * each for curve, each in zip(curves, found))
    assert spent <= bits * total * (1 + 1e-12) and spent == pytest.approx(bits * total, rel=1e-6)
    best = damage(curves, found)
    for (i, one), (j, other) in itertools.permutations(enumerate(curves), 2):
        moved = [*found]
        moved[i] += 1e-3 / one.weights
        moved[j] -= 1e-3 / other.weights
        if moved[i] <= one.most and moved[j] >= other.least:
            assert damage(curves, moved) >= best * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-3, 1e3)), min_size=2, max_size=6))
def test_opqs_steps_are_as_the_root_of_what_weights_count(layers):
    """Delta ~ w^-1/2, so bits differ by half the logarithm of w; one w for all: one step for all."""
    curves = [of_first(n, [(3.0, n * w), (0.0, 0.0), (20.0, 0.0)]) for n, w in layers]
    found = rates(curves, 10.0)
    for (_, w), bits in zip(layers, found):
        assert bits - found[0] == pytest.approx(math.log2(w / layers[0][1]) / 2, abs=1e-6)


def test_the_fit_finds_the_curve_that_points_lie_on_and_falls_back_where_there_is_none():
    points = [(b, math.exp(1.5 - 0.9 * b)) for b in (3.0, 2.0, 2.5, 4.0)]
    found = fitted(10, points)
    assert (found.start, found.fall, found.least, found.most) == pytest.approx((1.5, 0.9, 2.0, 4.0))
    far = fitted(10, [*points, (8.0, 1e-9)])  # a small damage has little weight
    assert far.fall == pytest.approx(0.9, rel=1e-3)
    for lost in ([(3.0, 0.5)], [(3.0, 0.5), (4.0, 0.5)], [(3.0, 0.5), (4.0, 0.6)], [(3.0, 0.0), (4.0, 0.0)]):
        assert fitted(10, lost) == of_first(10, lost) and fitted(10, lost).fall == FALL


options = st.lists(st.builds(Option, st.integers(0, 400), st.floats(0, 100), st.just({})), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(st.lists(options, min_size=1, max_size=5), st.floats(0.5, 8))
def test_a_choice_by_formula_is_within_the_limit_and_no_worse_than_the_first_options(menus, bits):
    """The first option of each is what every layer has with uniform bits."""
    offered = [Menu([str(number)], 50, [Option(int(50 * bits), 50.0, {}), *menu]) for number, menu in enumerate(menus)]
    for formula in FORMULAS:
        found = share_out_by_curves(offered, bits, formula)
        assert all(option in menu.options for menu, option in zip(offered, found))
        assert sum(option.bits for option in found) <= bits * 50 * len(offered)
        assert sum(option.damage for option in found) <= 50.0 * len(offered)


@pytest.mark.parametrize("formula", FORMULAS)
def test_where_layers_are_unlike_bits_move_and_little_is_left_to_gain(formula):
    """Sensitivities spread log-normally (sigma 1): less damage than uniform bits, about the exact choice."""
    menus = []
    for number in range(40):
        worth = math.exp(2 * math.sin(number * 1.7))
        steps = [3.0, *(1 + n / 8 for n in range(33))]
        menus.append(Menu([str(number)], 800, [Option(int(800 * b), worth * 4**-b, {}) for b in steps]))
    found, exact = share_out_by_curves(menus, 3.0, formula), share_out(menus, 3.0)
    after, best, uniform = (
        sum(one.damage for one in each) for each in (found, exact, [menu.options[0] for menu in menus])
    )
    assert after <= 0.7 * uniform and after <= 1.1 * best
