"""Bits shared out among layers: menus of what each may have, and the choice of least damage in all."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from cluscomp.errors import named
from cluscomp.kernels.counting import once
from cluscomp.solve import curves
from cluscomp.solve.groups import Group
from cluscomp.solve.layer import Layer
from cluscomp.solve.shapes import Effort, Matrices, Shape, around, expected_bits, menu, weights_in


@dataclass(frozen=True)
class Option:
    """Something that layers may have: its stored bits, the damage that it would leave, and the settings that make it.

    `settings` are plain values, of the method that offers it.
    """

    bits: int
    damage: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Menu:
    """What some layers that go together may have, the first option within any limit; their names and weights in all."""

    names: list[str]
    weights: int
    options: list[Option]


def share_out(menus: Sequence[Menu], bits: float) -> list[Option]:
    """An option of each menu, so that all together do the least damage in `bits` a weight of all of them.

    For a price of a bit each menu's best option stands alone (Lagrange); the lowest price that keeps within the bits is
    found by bisection over the prices at which a choice changes. What is left is spent on the best single changes.
    Never more damage than the first options together.
    """
    limit = bits * sum(menu.weights for menu in menus)
    first = [menu.options[0] for menu in menus]
    return _filled(menus, _best_price([menu.options for menu in menus], first, limit), limit)


def share_out_by_curves(menus: Sequence[Menu], bits: float, formula: Literal["opq", "marginal"]) -> list[Option]:
    """As `share_out`, but what each menu spends follows from a formula for how its damage falls (solve/curves.py).

    Of each menu it is the option of least damage within the bits that the formula gives it; then as there.
    """
    fit = {"opq": curves.of_first, "marginal": curves.fitted}[formula]
    found = [fit(one.weights, [(option.bits / one.weights, option.damage) for option in one.options]) for one in menus]
    picked = []
    for offered, rate in zip(menus, curves.rates(found, bits)):
        least = min(option.bits for option in offered.options)
        within = [option for option in offered.options if option.bits <= max(rate * offered.weights, least)]
        picked.append(min(within, key=lambda option: option.damage))
    return _filled(menus, picked, bits * sum(menu.weights for menu in menus))


def _filled(menus: Sequence[Menu], picked: list[Option], limit: float) -> list[Option]:
    """What was picked within the limit, with the best single changes that still fit; the first options if better."""
    first = [menu.options[0] for menu in menus]
    while True:
        left = limit - _total_bits(picked)
        gains = [
            (old.damage - option.damage, number, place)
            for number, (menu, old) in enumerate(zip(menus, picked))
            for place, option in enumerate(menu.options)
            if option.bits - old.bits <= left and option.damage < old.damage
        ]
        if not gains:
            return picked if _total_damage(picked) <= _total_damage(first) else first
        _, number, place = max(gains)
        picked = [*picked[:number], menus[number].options[place], *picked[number + 1 :]]


def _best_price(menus: list[list[Option]], first: list[Option], limit: float) -> list[Option]:
    """The options of least damage plus price times bits, at the lowest price at which all are within the limit."""

    def at(price: float) -> list[Option]:
        return [min(menu, key=lambda option: option.damage + price * option.bits) for menu in menus]

    prices = sorted(
        {(a.damage - b.damage) / (b.bits - a.bits) for menu in menus for a in menu for b in menu if a.bits < b.bits}
    )
    low, high, picked = -1, len(prices), first  # just above prices[high] all is within the limit
    while high - low > 1:
        middle = (low + high) // 2
        found = at(math.nextafter(prices[middle], math.inf))
        if _total_bits(found) <= limit:
            high, picked = middle, found
        else:
            low = middle
    return picked


def _total_bits(options: list[Option]) -> int:
    return sum(option.bits for option in options)


def _total_damage(options: list[Option]) -> float:
    return float(sum(option.damage for option in options))


Shapes = Callable[[Matrices, float], list[Shape]]


def measured_menu(group: Group, shapes: Shapes, bits: float, floor: float, effort: Effort) -> Menu:
    """Codebooks for a group at and around `bits` a weight, with the damage measured on its weights.

    It is the relative error that K-means leaves, weighted as its points are, times what the layers are worth. Where one
    input is far larger than all others that error tells of its sub-vectors alone and a handful of centroids seems to
    do; `floor`, a share of `bits`, is the least that is offered. `shapes(matrices, bits)` is as `shapes.reachable`
    gives them.
    """
    with named(group.names):
        make = lambda: (  # noqa: E731
            menu(group.points, partial(shapes, group.matrices), bits, group.recipe, group.generator, floor, effort),
            group.energy,
        )
        found, energy = once(("menu", group.alike, bits, floor, effort), group.weights[0], make)
    damage = group.worth / energy
    options = [Option(round(shape.bits * group.numbers), error * damage, by_hand(shape)) for shape, error in found]
    return Menu(list(group.names), group.numbers, options)


def expected_menu(
    names: Sequence[str],
    matrices: Matrices,
    shapes: Shapes,
    bits: float,
    worth: float,
    quality: Callable[[Shape], float] = expected_bits,
    floor: float = 0.0,
) -> Menu:
    """As `measured_menu`, as if weights were Gaussian and of one variance, so that nothing is measured.

    Nothing below the share `floor` of `bits` is offered. `worth` is what an error as large as the outputs counts,
    `quality` of a shape is as `shapes.expected_bits`.
    """
    weights = weights_in(matrices)
    with named(names):
        found = [max(shapes(matrices, bits), key=quality), *around(partial(shapes, matrices), bits, floor)]
    options = [Option(round(one.bits * weights), worth * 4 ** -quality(one), by_hand(one)) for one in found]
    return Menu(list(names), weights, options)


def rates_menu(
    name: str, layer: Layer, errors: Sequence[tuple[float, float]], bits: float, floor: float, least: float
) -> Menu:
    """What a layer that may have any number of bits is offered: `bits` first, then up to a bit more or less.

    Of a layer with a price, which may be many times another's, up to three more. `errors` are bits a weight with the
    relative error that they leave; between them its logarithm is a straight line, and of a single one nothing but
    `bits` follows. Nothing below the share `floor` of `bits` is offered,
    nor below `least`, of which the method can do no less.
    """
    offered = [bits]
    if len(errors) > 1:
        lowest = max(floor * bits, least)
        more = 16 if layer.price is None else 48
        offered += [bits + n / 16 for n in range(-16, more + 1) if n and lowest <= bits + n / 16 <= 8]
    points, weights = sorted(errors), layer.weight_OI.numel()
    options = [Option(int(each * weights), layer.worth * _between(points, each), {"bits": each}) for each in offered]
    return Menu([name], weights, options)


def _between(points: list[tuple[float, float]], x: float) -> float:
    """Points (x, y) of rising x as a line on which log y is straight between two and beyond the last."""
    if len(points) == 1:
        return points[0][1]
    after = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    if x0 == x1 or min(y0, y1) <= 0:
        return y0
    return math.exp(math.log(y0) + math.log(y1 / y0) * (x - x0) / (x1 - x0))


def by_hand(shape: Shape) -> dict[str, Any]:
    """The settings that give a method's codebook this shape."""
    return {"bits": None, "vector_dim": shape.vector_dim, "codebook_size": shape.codebook_size}
