"""Lengths and sizes of codebooks: the bits that they store, and the choice that meets a limit of bits."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from cluscomp.forms.codebook import STORAGE, Axis, CodebookWeight, Storage, lines_of, num_sub_vectors
from cluscomp.kernels.codes import MAX_CODE_BITS, code_bits
from cluscomp.kernels.counting import error_asked, times
from cluscomp.solve.kmeans import Recipe, kmeans

MAX_VECTOR_DIM = 16
SHORTLIST = 4  # candidates whose error is measured, at most
BEHIND = 0.25  # bits that one of them may be expected to be behind the best: a third more error
HARDLY_SETTLED = 1.4  # times as long as later rounds of K-means: the first ones, which alone are made then
OFFSETS = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0)  # bits about the target that a menu offers

Matrices = Sequence[tuple[int, int]]  # (O, I) of those that share a codebook
Points = Callable[[int], tuple[Tensor, Tensor | None]]  # sub-vectors (N, D) of length D, and their weights (N,) or None


@dataclass(frozen=True)
class Effort:
    """What a measurement of an error takes: sub-vectors, or so many a centroid if that is more, and rounds by start.

    Where few sub-vectors make up the error, as with rows or inputs far larger than others, many centroids look better
    than they are, and the more so the fewer are looked at.
    """

    sample: int
    each: int
    kd: int
    random_points: int  # with few rounds small codebooks look worse than they are


FULL, BRIEF = Effort(32_768, 16, 4, 10), Effort(8_192, 8, 2, 5)


@dataclass(frozen=True)
class Shape:
    """Sub-vector length D and number of centroids K of a codebook, with the stored bits per weight of its matrices."""

    vector_dim: int
    codebook_size: int
    bits: float

    @classmethod
    def of(
        cls, matrices: Matrices, axis: Axis, vector_dim: int, codebook_size: int, storage: Storage = "float16"
    ) -> "Shape":
        """A codebook (K, D) with the bits per weight that it, the codes and scales of matrices (O, I) take."""
        return cls(
            vector_dim, codebook_size,
            _bits(matrices, axis, vector_dim, codebook_size, storage) / weights_in(matrices),
        )  # fmt: skip


def _bits(matrices: Matrices, axis: Axis, vector_dim: int, codebook_size: int, storage: Storage) -> int:
    """Stored bits of matrices (O, I): where there are several, with one codebook and a scale each."""
    return sum(
        sum(
            CodebookWeight.bits(
                out_features=out_features,
                in_features=in_features,
                axis=axis,
                vector_dim=vector_dim,
                codebook_size=codebook_size,
                codebooks=1,
                storage=storage,
                scaled=len(matrices) > 1,
                follows=number > 0,
            ).values()
        )
        for number, (out_features, in_features) in enumerate(matrices)
    )


def weights_in(matrices: Matrices) -> int:
    """The weights of all matrices (O, I)."""
    return sum(out_features * in_features for out_features, in_features in matrices)


def reachable(matrices: Matrices, axis: Axis, bits: float, storage: Storage = "float16") -> list[Shape]:
    """For each D the largest K with which matrices (O, I) that share a codebook stay at or under `bits` a weight.

    With D fixed more centroids never fit worse, so nothing else needs to be considered. K never exceeds the number
    of sub-vectors or 65,536. Raises ValueError, with the bits that are within reach, if no codebook fits.
    """
    return list(_reachable(tuple(matrices), axis, bits, storage))


@cache  # blocks are alike: a plan asks the same for each
def _reachable(matrices: tuple[tuple[int, int], ...], axis: Axis, bits: float, storage: Storage) -> list[Shape]:
    length = min(lines_of(*matrix, axis)[1] for matrix in matrices)
    limit = bits * weights_in(matrices)
    dims = range(1, min(MAX_VECTOR_DIM, length) + 1)
    shapes = []
    for vector_dim in dims:
        vectors = sum(num_sub_vectors(*matrix, vector_dim, axis) for matrix in matrices)
        each = 8 * STORAGE[storage].itemsize * vector_dim  # bits of one more centroid, while codes keep their width
        for width in range(MAX_CODE_BITS, 0, -1):
            most = 1 << width
            left = limit - _bits(matrices, axis, vector_dim, most, storage)
            size = min(most + int(left // each), most, vectors)
            if size >= 2 and code_bits(size) == width:
                shapes.append(Shape.of(matrices, axis, vector_dim, size, storage))
                break
    if not shapes:
        least, dim = min((Shape.of(matrices, axis, dim, 2, storage).bits, dim) for dim in dims)
        raise ValueError(
            f"bits={bits} is out of reach for {described(matrices)}: "
            f"the least is {least:.3f}, with vector_dim={dim} and codebook_size=2"
        )
    return shapes


def described(matrices: Matrices) -> str:
    """Matrices (O, I) in words."""
    shapes = " and ".join(f"{out_features} x {in_features}" for out_features, in_features in matrices)
    return f"a {shapes} matrix" if len(matrices) == 1 else f"matrices of {shapes} with one codebook"


def fixed(matrices: Matrices, axis: Axis, vector_dim: int, codebook_size: int, storage: Storage = "float16") -> Shape:
    """The shape that settings fix by hand, for matrices (O, I) that share the codebook.

    Raises ValueError if there are more centroids than sub-vectors.
    """
    vectors = sum(num_sub_vectors(*matrix, vector_dim, axis) for matrix in matrices)
    if codebook_size > vectors:
        raise ValueError(
            f"method.codebook_size={codebook_size} exceeds the {vectors} sub-vectors of length {vector_dim} in "
            f"{described(matrices)}; take fewer, or give bits=3 instead"
        )
    return Shape.of(matrices, axis, vector_dim, codebook_size, storage)


def best_of_sum(matrices: Matrices, axis: Axis, bits: float, storage: Storage, codebooks: int) -> Shape:
    """The best shape by `expected_bits` of codebooks whose centroids are added, within `bits` a weight for all of them.

    With the bits that all of them take. Raises ValueError as `reachable`.
    """
    try:
        shapes = reachable(matrices, axis, bits / codebooks, storage)
    except ValueError as error:
        raise ValueError(f"{error} (each of {codebooks} codebooks has its share of bits={bits})") from error
    best = max(shapes, key=partial(expected_bits, codebooks=codebooks))
    return replace(best, bits=codebooks * best.bits)


def expected_bits(shape: Shape, codebooks: int = 1) -> float:
    """Quality of (D, K) for Gaussian weights in bits: log2(K)/D less the high-rate loss of D dimensions.

    The loss is half the log2 of Zador's constant with the sphere bound on the cell shape; it ranks candidates only.
    Every further codebook whose centroids are added brings what its codes take.
    """
    dim = shape.vector_dim
    log_constant = math.log(2 / (dim + 2)) + 2 / dim * math.lgamma(dim / 2 + 1) + (dim + 2) / 2 * math.log1p(2 / dim)
    width = math.log2(shape.codebook_size)
    return width / dim - log_constant / math.log(4) + (codebooks - 1) * width / dim


def measured_error(
    points: Points, shape: Shape, recipe: Recipe, generator: torch.Generator, effort: Effort = FULL
) -> float:
    """Squared error per weight that clustering with (D, K) will leave, from a short K-means on a sample of sub-vectors.

    Fewer points per centroid than there are in all make the sample's own error too small; the factor
    (1 - K/N) / (1 - K/n) corrects that to first order. A test compares the outcome with full clustering. Where the
    points have weights the error is weighted by them.
    """
    points_ND, weights_N = points(shape.vector_dim)
    total = len(points_ND)
    sample = min(total, max(effort.sample, effort.each * shape.codebook_size))
    rounds = effort.kd if recipe.init == "kd" else effort.random_points
    short = replace(recipe, iterations=min(rounds, recipe.iterations))
    if points_ND.is_meta:  # as Gaussian points would have it
        error_asked()
        with times(HARDLY_SETTLED):
            some_n = None if weights_N is None else weights_N[:sample]
            kmeans(points_ND[:sample], shape.codebook_size, short, generator, some_n)
        return float(4.0 ** -expected_bits(shape))
    if sample < total:
        rows_n = torch.randperm(total, generator=generator)[:sample].to(points_ND.device)
        points_ND = points_ND[rows_n]
        weights_N = None if weights_N is None else weights_N[rows_n]
        if weights_N is not None and not bool(weights_N.any()):  # all drawn are of dead inputs: they count alike
            weights_N = None
    found = kmeans(points_ND, shape.codebook_size, short, generator, weights_N)
    bias = 1 - shape.codebook_size / sample
    correction = (1 - shape.codebook_size / total) / bias if bias else 1.0
    return found.inertia[-1] / points_ND.numel() * correction


def choose(
    points: Points, shapes: list[Shape], recipe: Recipe, generator: torch.Generator, effort: Effort = FULL
) -> Shape:
    """The (D, K) of least measured error (see `measured_error`) among the best by `expected_bits`.

    `shapes` as `reachable` gives them.
    """
    shortlist = _shortlist(shapes)
    if len(shortlist) == 1:
        return shortlist[0]
    return min(shortlist, key=lambda shape: measured_error(points, shape, recipe, generator, effort))


def _shortlist(shapes: list[Shape]) -> list[Shape]:
    """Those of which one may be the best, by `expected_bits`, the best first."""
    ranked = sorted(shapes, key=expected_bits, reverse=True)[:SHORTLIST]
    return [shape for shape in ranked if expected_bits(shape) >= expected_bits(ranked[0]) - BEHIND]


def menu(
    points: Points,
    shapes: Callable[[float], list[Shape]],
    bits: float,
    recipe: Recipe,
    generator: torch.Generator,
    floor: float = 0.0,
    effort: Effort = FULL,
) -> list[tuple[Shape, float]]:
    """Shapes at and around a bit target with their measured errors; the first is the one that `choose` would take.

    `shapes(bits)` is as `reachable` gives them. At the target some are measured, at other rates the best by
    `expected_bits`, none below a share `floor` of the target.
    """
    at_target = _shortlist(shapes(bits))
    measured = dict.fromkeys([*at_target, *around(shapes, bits, floor)])
    errors = {shape: measured_error(points, shape, recipe, generator, effort) for shape in measured}
    first = min(at_target, key=lambda shape: errors[shape])
    return [(first, errors.pop(first)), *errors.items()]


def around(shapes: Callable[[float], list[Shape]], bits: float, floor: float = 0.0) -> list[Shape]:
    """The best shapes by `expected_bits` at rates around a bit target, none below a share `floor` of it.

    `shapes(bits)` is as `reachable` gives them.
    """
    found = []
    for offset in (offset for offset in OFFSETS if bits + offset >= floor * bits):
        with suppress(ValueError):  # fewer bits than any codebook takes
            found.append(max(shapes(bits + offset), key=expected_bits))
    return found
