"""A weight as a product of two thin matrices, the best there are for it or for what its layer gives."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.stored import Stored, in_16_bits
from cluscomp.forms.uniform import UniformWeight, grids_for, rounded_weight
from cluscomp.kernels.counting import error_asked
from cluscomp.solve.along_outputs import DAMPING, invertible

PLAIN = 16  # bits of a number that is on no grid


@dataclass(frozen=True)
class Directions:
    """U (O, R) and V (R, I), whose product is a weight; what each of the R adds to the squared output, largest first.

    The root of a singular value stands on both sides: neither factor's columns or rows are far apart in size, unless
    inputs are far from 1 in size.
    """

    left_OR: Float[Tensor, "O R"]
    right_RI: Float[Tensor, "R I"]
    energies_R: Float[Tensor, " R"]

    def stored(self, rank: int, width: int, group: int) -> LowRank:
        """The form of the first `rank` directions, in 16 bits or on grids; see `bits`.

        Raises ValueError for numbers that do not fit 16 bits.
        """
        return LowRank(
            _factor(self.left_OR[:, :rank].float(), width, group), _factor(self.right_RI[:rank].float(), width, group)
        )

    def lost(self, rank: int) -> float:
        """What the squared output loses without the directions after `rank`, as a share of it."""
        error_asked()
        total = float(self.energies_R.sum())
        return float(self.energies_R[rank:].sum()) / total if total else 0.0


def directions(weight_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"] | None) -> Directions:
    """By the SVD of a weight, or with a positive definite second moment of its inputs H = L L^T by that of W L.

    The latter's first directions lose the least of the outputs (SVD-LLM, arXiv 2403.07378). Raises ValueError for a
    weight that is not finite or does not fit 16 bits.
    """
    in_16_bits(weight_OI)
    left_OR, sizes_R, right_RI, factor_II = by_outputs(weight_OI.double(), moment_II)
    roots_R = sizes_R.sqrt()
    return Directions(left_OR * roots_R, of_inputs(roots_R[:, None] * right_RI, factor_II), sizes_R.square())


def by_outputs(
    matrix_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"] | None, helps: str = DAMPING
) -> tuple[Float[Tensor, "O R"], Float[Tensor, " R"], Float[Tensor, "R I"], Float[Tensor, "I I"] | None]:
    """U, S, V of M L, and L, for M (O, I) and a positive definite second moment H = L L^T; without one those of M.

    Raises ValueError, with what `helps`, if H is not positive definite.
    """
    with invertible(helps):
        factor_II = None if moment_II is None else torch.linalg.cholesky(moment_II.double())
    scaled_OI = matrix_OI if factor_II is None else matrix_OI @ factor_II.to(matrix_OI.dtype)
    return *torch.linalg.svd(scaled_OI, full_matrices=False), factor_II


def of_inputs(right_RI: Float[Tensor, "R I"], factor_II: Float[Tensor, "I I"] | None) -> Float[Tensor, "R I"]:
    """Rows (R, I) of `by_outputs` back in the coordinates of the inputs: times L^-1, solved in float64."""
    if factor_II is None:
        return right_RI
    found_RI = torch.linalg.solve_triangular(factor_II, right_RI.double(), upper=False, left=False)
    return found_RI.to(right_RI.dtype)  # type: ignore[no-any-return]


def bits(outputs: int, inputs: int, rank: int, width: int, group: int) -> int:
    """Stored bits of both factors of a weight (O, I).

    Numbers of 16 bits, or of `width` less on grids of about `group` numbers, each with a scale of 16 bits.
    """
    total = 0
    for rows, columns in ((outputs, rank), (rank, inputs)):
        sizes = {"out_features": rows, "in_features": columns}
        if width == PLAIN:
            parts = PlainWeight.bits(**sizes)
        else:
            grid = {"width": width, "groups": _groups(columns, group), "zeros": "none", "scaled_inputs": False}
            parts = UniformWeight.bits(**sizes, **grid)  # type: ignore[arg-type]
        total += sum(parts.values())
    return total


def within(limit: float, outputs: int, inputs: int, width: int, group: int) -> int:
    """The largest rank whose factors take at most `limit` bits a weight (O, I). Raises ValueError if none does."""
    rank = min(outputs, inputs)
    while rank and bits(outputs, inputs, rank, width, group) > limit * outputs * inputs:
        rank -= 1
    if rank == 0:
        least = bits(outputs, inputs, 1, width, group) / (outputs * inputs)
        raise ValueError(f"bits={limit} is out of reach for {outputs} x {inputs}: rank 1 takes {least:.3f}")
    return rank


Shapes = Mapping[str, tuple[int, int]]  # (O, I) of matrices by name


def share(ranks: Mapping[str, int], shapes: Shapes) -> float:
    """Numbers that factors of these ranks have, as a share of the dense matrices'; dense ones where these have less."""
    numbers = sum(_numbers(rank, *shapes[name]) for name, rank in ranks.items())
    return numbers / sum(outputs * inputs for outputs, inputs in shapes.values())


def check_share(ratio: float, shapes: Shapes) -> None:
    """Raise ValueError if even one direction of each matrix has more than a share `ratio` of the dense numbers."""
    least = share(dict.fromkeys(shapes, 1), shapes)
    if least > ratio:
        raise ValueError(f"{ratio} is out of reach: one direction of each matrix has {least:.4f} of the dense numbers")


def highest(scores: Mapping[str, Float[Tensor, " R"]], shapes: Shapes, ratio: float) -> dict[str, Bool[Tensor, " R"]]:
    """Which directions of each matrix stay, (R,), when just so many leave that a share `ratio` of all numbers is left.

    Those with the lowest scores of all matrices leave first, of equal ones those that come later in their matrix; the
    best of each matrix stays. ACIP (arXiv 2502.01717), where a matrix may lose all. See `share` for what counts. Raises
    ValueError as `check_share`.
    """
    check_share(ratio, shapes)
    names = list(scores)
    values = [scores[name].tolist() for name in names]
    best = [max(range(len(one)), key=one.__getitem__) for one in values]
    leaving = sorted(
        (score, -place, number)
        for number, one in enumerate(values)
        for place, score in enumerate(one)
        if place != best[number]
    )
    ranks = [len(one) for one in values]
    numbers = sum(_numbers(rank, *shapes[name]) for name, rank in zip(names, ranks))
    most = ratio * sum(outputs * inputs for outputs, inputs in shapes.values())
    kept = [torch.ones(rank, dtype=torch.bool) for rank in ranks]
    for _, place, number in leaving:
        if numbers <= most:
            break
        shape, rank = shapes[names[number]], ranks[number]
        numbers += _numbers(rank - 1, *shape) - _numbers(rank, *shape)
        ranks[number] -= 1
        kept[number][-place] = False
    return {name: one.to(scores[name].device) for name, one in zip(names, kept)}


def _numbers(rank: int, outputs: int, inputs: int) -> int:
    return min(rank * (outputs + inputs), outputs * inputs)


def _factor(weight_OI: Tensor, width: int, group: int) -> Stored:
    if width == PLAIN:
        return PlainWeight(in_16_bits(weight_OI))
    scales_OG, zeros_OG = grids_for(weight_OI, width, _groups(weight_OI.shape[1], group), symmetric=True)
    return rounded_weight(weight_OI, scales_OG, zeros_OG, width, symmetric=True)


def _groups(columns: int, group: int) -> int:
    return -(-columns // group)
