"""Bits shared out among layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cluscomp.errors import named
from cluscomp.solve.kmeans import Recipe
from cluscomp.solve.shapes import Matrices, Shape, around, choose, expected_bits, menu, weights_in


def expected_shapes(
    groups: Sequence[Matrices],
    shapes: Callable[[Matrices, float], list[Shape]],
    bits: float,
    quality: Callable[[Shape], float] = expected_bits,
) -> list[Shape]:
    """A shape for each group of matrices, of least total damage in `bits` a weight of all of them.

    As if the weights were Gaussian and of one variance, so that nothing is measured: `quality` of a shape is as
    `expected_bits`. `shapes(matrices, bits)` is as `reachable` gives them.
    """
    numbers = [weights_in(matrices) for matrices in groups]
    offered = [
        [max(shapes(matrices, bits), key=quality), *around(partial(shapes, matrices), bits)] for matrices in groups
    ]
    menus = [
        [Option(round(shape.bits * number), number * 4 ** -quality(shape)) for shape in found]
        for found, number in zip(offered, numbers)
    ]
    return [found[number] for found, number in zip(offered, allocate(menus, bits * sum(numbers)))]


@dataclass(frozen=True)
class Option:
    """What a codebook would cost, in bits, and the damage that it would leave."""

    bits: int
    damage: float


def allocate(menus: list[list[Option]], budget: float | None = None) -> list[int]:
    """Which option of each menu to take, so that all together do the least damage in `budget` bits.

    None: in the bits of all first options, which are within any budget.

    For a price of a bit each menu's best option stands alone (Lagrange); the lowest price that keeps within the bits is
    found by bisection over the prices at which a choice changes. What is left is spent on the best single changes.
    Never more damage than the first options together.
    """

    def at(price: float) -> list[int]:
        return [min(range(len(menu)), key=lambda i: menu[i].damage + price * menu[i].bits) for menu in menus]

    def total(picked: list[int], what: str) -> float:
        return float(sum(getattr(menu[i], what) for menu, i in zip(menus, picked)))

    first = [0] * len(menus)
    budget = total(first, "bits") if budget is None else budget
    prices = sorted(
        {(a.damage - b.damage) / (b.bits - a.bits) for menu in menus for a in menu for b in menu if a.bits < b.bits}
    )
    low, high = -1, len(prices)  # just above prices[high] all is within the budget
    picked = first
    while high - low > 1:
        middle = (low + high) // 2
        found = at(math.nextafter(prices[middle], math.inf))
        if total(found, "bits") <= budget:
            high, picked = middle, found
        else:
            low = middle
    while True:
        left = budget - total(picked, "bits")
        gains = [
            (menu[i].damage - option.damage, number, j)
            for number, (menu, i) in enumerate(zip(menus, picked))
            for j, option in enumerate(menu)
            if option.bits - menu[i].bits <= left and option.damage < menu[i].damage
        ]
        if not gains:
            return picked if total(picked, "damage") <= total(first, "damage") else first
        _, number, j = max(gains)
        picked = [*picked[:number], j, *picked[number + 1 :]]


Shapes = Callable[[Matrices, float | None], list[Shape]]


class Group(Protocol):
    """Layers that share a codebook."""

    names: Sequence[str]
    matrices: list[tuple[int, int]]
    numbers: int  # of all weights
    generator: torch.Generator

    def points(self, vector_dim: int) -> tuple[Tensor, Tensor | None]:
        """The sub-vectors (N, D) of all layers and what each counts, (N,), or None."""
        ...

    @property
    def energy(self) -> float:
        """The mean square of the weights, weighted as K-means weights them."""
        ...


Groups = Sequence[Callable[[], Group]]


def uniform(groups: Groups, shapes: Shapes, bits: float | None, recipe: Recipe) -> list[Shape]:
    """The best shape within `bits` for each group."""
    chosen = []
    for group in (opened() for opened in groups):
        with named(group.names):
            chosen.append(choose(group.points, shapes(group.matrices, bits), recipe, group.generator))
    return chosen


def fill(groups: Groups, shapes: Shapes, bits: float, recipe: Recipe, floor: float = 0.0) -> list[Shape]:
    """The shapes of least total damage in the bits that all groups may take together.

    A group's damage is the relative error that K-means leaves, weighted as its points are, times its weights. Where one
    input is far larger than all others that error tells of its sub-vectors alone and a handful of centroids seems to
    do; `floor`, a share of `bits`, is the least that a group is offered.
    """
    offered, menus, numbers = _menus(groups, shapes, bits, recipe, floor, lambda group: group.numbers / group.energy)
    return [found[number] for found, number in zip(offered, allocate(menus, bits * numbers))]


def gaussian(groups: Groups, shapes: Shapes, bits: float, _recipe: Recipe) -> list[Shape]:
    """As `fill`, the damage being that of Gaussian weights of one variance: from shapes alone, nothing is measured."""
    return expected_shapes([opened().matrices for opened in groups], shapes, bits)


def sensitivity(groups: Groups, shapes: Shapes, bits: float, recipe: Recipe, floor: float = 0.0) -> list[Shape]:
    """The shapes of least total damage in no more bits than `uniform` would take.

    A group's damage is the relative error that K-means leaves, weighted as its points are, times its matrices; `floor`
    is as in `fill`.
    """
    offered, menus, _ = _menus(groups, shapes, bits, recipe, floor, lambda group: len(group.matrices) / group.energy)
    return [found[number] for found, number in zip(offered, allocate(menus))]


def _menus(
    groups: Groups, shapes: Shapes, bits: float, recipe: Recipe, floor: float, damage: Callable[[Group], float]
) -> tuple[list[list[Shape]], list[list[Option]], int]:
    """For each group the shapes it may have and what they cost and damage; and the number of all weights."""
    offered, menus, numbers = [], [], 0
    for group in (opened() for opened in groups):
        with named(group.names):
            measured = menu(group.points, partial(shapes, group.matrices), bits, recipe, group.generator, floor)
        offered.append([shape for shape, _ in measured])
        menus.append([Option(round(shape.bits * group.numbers), error * damage(group)) for shape, error in measured])
        numbers += group.numbers
    return offered, menus, numbers
