"""Gates: the levels of a menu, what they learn, and the menu that comes of it; what a block's gates are worth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluscomp.solve.allocate import Menu, Option, share_out
from cluscomp.solve.gates import Gates, learned, nested
from cluscomp.stages.allocation import ByGates
from cluscomp.stages.gating import gated

options = st.lists(st.builds(Option, st.integers(1, 400), st.floats(0, 100), st.just({})), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(options, st.integers(2, 5), st.lists(st.floats(-5, 5), min_size=9, max_size=9))
def test_levels_are_nested_and_the_learned_menu_is_of_the_methods_own_options(offered, levels, worth):
    menu = Menu(["x"], 50, offered)
    chain = nested(menu, levels)
    assert 1 <= len(chain) <= levels and all(one in offered for one in chain)
    for below, above in zip(chain, chain[1:]):
        assert below.bits < above.bits and below.damage > above.damage
    found = learned(menu, chain, worth)
    assert (found.options[0].bits, found.names, found.weights) == (offered[0].bits, ["x"], 50)
    assert {one.bits for one in chain} <= {one.bits for one in found.options} <= {one.bits for one in offered}
    in_order = [one.damage for one in sorted(found.options, key=lambda one: one.bits)]
    assert in_order == sorted(in_order, reverse=True) and in_order[-1] == 0
    lost = {one.bits: one.damage for one in found.options}
    for place, level in enumerate(chain):
        assert lost[level.bits] == pytest.approx(sum(max(each, 0) for each in worth[place + 1 : len(chain)]))


def test_between_two_levels_damage_falls_as_the_methods_own():
    menu = Menu(["x"], 50, [Option(bits, damage, {}) for bits, damage in ((3, 4.0), (1, 16.0), (2, 8.0), (5, 1.0))])
    found = learned(menu, [menu.options[1], menu.options[3]], [0.0, 30.0])
    assert [(one.bits, one.damage) for one in found.options] == [(3, 6.0), (1, 30.0), (2, 14.0), (5, 0.0)]


def test_those_gates_close_first_that_are_worth_least_a_bit_and_a_mean_is_learned():
    gates = Gates([[Option(bits, 0.0, {}) for bits in each] for each in ([0, 10], [0, 1, 2])])
    gates.learn([-5.0, -1.0])
    gates.learn([-7.0, -3.0])
    assert gates.worth == [[0.0, 6.0], [0.0, 0.0, 2.0]] and gates.left == 3
    gates.close(1)  # 6 for 10 bits is less than 2 for one
    assert gates.top == [0, 2]
    gates.learn([0.0, -4.0])
    gates.close(1)
    gates.learn([0.0, -4.0])
    assert gates.worth == [[0.0, 6.0], [0.0, 4.0, pytest.approx(8 / 3)]]
    gates.close(2)
    assert gates.left == 0


class Beside(nn.Module):
    """Two layers that read the same, one of which counts a hundred times as much."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(8, 6), nn.Linear(8, 6)
        self.requires_grad_(False)

    def forward(self, x_BTI):
        return torch.cat([self.small(x_BTI), 10 * self.large(x_BTI)], -1)


@pytest.mark.parametrize("width", [None, 12])
def test_what_gates_learn_of_a_block_is_what_each_level_takes_off_and_decides_where_bits_go(width):
    """Of layers whose outputs do not mix the gradient half-way is the difference itself. First tokens do not count.

    Nor does what travels behind the hidden states.
    """
    torch.manual_seed(0)
    block, x_BTI = Beside(), torch.randn(2, 5, 8)
    y_BTO, dense = block(x_BTI), {name: getattr(block, name).weight.clone() for name in ("small", "large")}
    entering_BTI = x_BTI.clone()
    entering_BTI[:, 0] = 1e3

    def made(names, option):
        return {name: (dense[name] * option.settings["steps"]).round() / option.settings["steps"] for name in names}

    def loss(names, option):
        for name, weight in made(names, option).items():
            getattr(block, name).weight.data = weight
        error = (block(x_BTI) - y_BTO)[:, 1:].square().sum()
        for name in names:
            getattr(block, name).weight.data = dense[name]
        return 7 * float(error / y_BTO[:, 1:].square().sum())

    def with_others(one, x_BTI):
        return one(x_BTI) if width is None else torch.cat([one(x_BTI), 100 * x_BTI], -1)

    menus = [Menu([name], 48, [Option(48 * b, 4.0**-b, {"steps": 2**b}) for b in (1, 2, 3, 4)]) for name in dense]
    expected = [[loss(menu.names, option) for option in menu.options] for menu in menus]
    found = gated(ByGates(scope="model", levels=4, steps=6), menus, made, with_others, block,
                  ([entering_BTI], [with_others(block, x_BTI)]), 7.0, width)  # fmt: skip
    for menu, learnt, losses in zip(menus, found, expected):
        assert [one.settings for one in learnt.options] == [one.settings for one in menu.options]
        for option, lost in zip(learnt.options, losses):
            assert option.damage == pytest.approx(lost - losses[-1], abs=1e-5)
    taken = [option.settings["steps"] for option in share_out(found, 2.5)]
    assert taken[1] > taken[0]
    assert [one.settings["steps"] for one in share_out(found, 1)] == [2, 2]  # all gates closed
    assert [one.settings["steps"] for one in share_out(found, 8)] == [16, 16]  # all open
