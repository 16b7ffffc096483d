"""Who gets how many bits: shapes for the codebooks of a block, one function for each policy.

A policy is `policy(groups, shapes, bits, recipe)` and returns a shape for each group. A group is opened when its turn
comes, so that one alone is in memory; `shapes(matrices, bits)` is what a codebook of theirs may have within `bits` a
weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cluscomp.budget import Matrices, Option, Shape, allocate, choose, expected_shapes, menu
from cluscomp.kmeans import Recipe

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


@contextmanager
def named(names: Sequence[str]) -> Iterator[None]:
    """Begin the text of a ValueError with the layers' names, if there are any."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}" if names else str(error)) from error
