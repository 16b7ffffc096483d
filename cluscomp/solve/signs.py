"""A weight as a product of two matrices of signs with scales, by what the layer's output loses, tr(E H E^T).

W (O, I) is taken for diag(h) U diag(m) V diag(g), with U (O, R) and V (R, I) of signs: the form of DBF (arXiv
2505.11076) and NanoQuant (arXiv 2602.06694). As there, splitting (ADMM) finds the signs: real factors solve least
squares, signs with scales of rank 1 are what is nearest to them and what they still owe. Unlike there: squares are
those of the output and not of weights with scaled inputs, a factor is solved for against the other one's signs, not
against its real numbers, and the singular vectors that they start from are turned at random. Then signs and scales
descend in turn.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.signs import SignWeight
from cluscomp.forms.stored import MOST
from cluscomp.forms.uniform import divisor
from cluscomp.kernels.counting import alike, error_asked, times
from cluscomp.solve.along_outputs import output_error

PENALTY = (0.1, 1.0)  # at first and at last, in mean diagonals of what the least squares solve (0.03 or 2 leave more)
TINY = 1e-20
LEAST_SIZE = 1e-3  # of an input beside the others, where its weights count by it
TOGETHER = 128  # ranks whose signs descend together; of fewer a few more turn
BATCH = 64  # columns whose changes are gathered before they reach the rest


class Inputs:
    """What factoring needs to know of a layer's inputs; layers that read one input share it.

    Args:
        moment_II: (I, I), their second moment, positive definite (see `along_outputs.damped`).
    """

    def __init__(self, moment_II: Float[Tensor, "I I"]) -> None:
        self.moment_II = moment_II
        self.sizes_I = moment_II.diagonal().sqrt()
        self.alike_II = moment_II / self.sizes_I / self.sizes_I[:, None]  # of inputs that are all of one size
        values_I, self.vectors_II = torch.linalg.eigh(self.alike_II)
        self.values_I = values_I.clamp(min=1e-6)


@dataclass(frozen=True)
class Factors:
    """diag(h) U diag(m) V diag(g): signs U (O, R) and V (R, I); scales h (O,), m (R,), g (I,)."""

    left_OR: Float[Tensor, "O R"]
    right_RI: Float[Tensor, "R I"]
    outputs_O: Float[Tensor, " O"]
    ranks_R: Float[Tensor, " R"]
    inputs_I: Float[Tensor, " I"]

    @property
    def scaled_left_OR(self) -> Float[Tensor, "O R"]:
        """diag(h) U diag(m), (O, R)."""
        return self.left_OR * self.outputs_O[:, None] * self.ranks_R

    @property
    def scaled_right_RI(self) -> Float[Tensor, "R I"]:
        """V diag(g), (R, I)."""
        return self.right_RI * self.inputs_I

    def dense(self) -> Float[Tensor, "O I"]:
        """The weight (O, I)."""
        return self.scaled_left_OR @ self.scaled_right_RI

    def stored(self) -> LowRank:
        """The stored form; scales of outputs, ranks and inputs have one root mean square, as their product allows."""
        sizes = [scales.square().mean().sqrt() for scales in (self.outputs_O, self.ranks_R, self.inputs_I)]
        size = (sizes[0] * sizes[1] * sizes[2]) ** (1 / 3)
        outputs_O, ranks_R, inputs_I = (
            torch.where(one > 0, scales * size / one, 0.0)
            for scales, one in zip((self.outputs_O, self.ranks_R, self.inputs_I), sizes)
        )
        return LowRank(
            SignWeight.from_signs(self.left_OR, outputs_O, ranks_R),
            SignWeight.from_signs(self.right_RI, None, inputs_I),
        )


def rank_within(bits: float, out_features: int, in_features: int) -> int:
    """The largest rank whose signs, scales and padding take at most `bits` a weight (O, I). Raises ValueError at 0."""
    most = int(bits * out_features * in_features)
    sides = out_features + in_features
    rank = (most - 16 * sides) // (sides + 16)
    while rank > 0 and sum(LowRank.bits(**spec(out_features, in_features, rank)).values()) > most:
        rank -= 1
    if rank < 1:
        raise ValueError(
            f"bits={bits} is out of reach for a {out_features} x {in_features} matrix: a rank takes {sides + 16} bits, "
            f"the scales of outputs and inputs {16 * sides}"
        )
    return rank


def least_bits(out_features: int, in_features: int) -> float:
    """Bits a weight (O, I) at which `rank_within` gives 1, and none below."""
    stored = sum(LowRank.bits(**spec(out_features, in_features, 1)).values())
    return math.nextafter(stored / (out_features * in_features), math.inf)


def spec(out_features: int, in_features: int, rank: int) -> dict[str, dict[str, object]]:
    """The spec of the `LowRank` of two matrices of signs for a weight (O, I)."""
    left = {"out_features": out_features, "in_features": rank, "scaled_outputs": True, "scaled_inputs": True}
    right = {"out_features": rank, "in_features": in_features, "scaled_outputs": False, "scaled_inputs": True}
    return {"left": {"kind": SignWeight.kind, **left}, "right": {"kind": SignWeight.kind, **right}}


def factored(
    weight_OI: Float[Tensor, "O I"],
    inputs: Inputs,
    rank: int,
    *,
    rounds: int,
    descents: int,
    generator: torch.Generator,
) -> Factors:
    """Factors of a float32 weight (O, I) of a rank: `rounds` of splitting, then `descents` of signs and scales.

    Raises ValueError for weights that are not finite or fit no 16-bit float.
    """
    _check(weight_OI)
    found = refitted(weight_OI, inputs.moment_II, split(weight_OI, inputs, rank, rounds, generator))
    for _ in alike(range(descents), weight_OI):
        found = refitted(weight_OI, inputs.moment_II, flipped(weight_OI, inputs.moment_II, found))
    return found


def relative_error(weight_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"], factors: Factors) -> float:
    """tr(E H E^T) over tr(W H W^T), of (O, I) and (I, I); without numbers 1."""
    if weight_OI.is_meta:
        error_asked()
        return 1.0
    return output_error(factors.dense() - weight_OI, moment_II) / (output_error(weight_OI, moment_II) or 1.0)


def split(
    weight_OI: Float[Tensor, "O I"], inputs: Inputs, rank: int, rounds: int, generator: torch.Generator
) -> Factors:
    """Signs and scales by splitting: at least squares real factors, and what signs with scales are nearest to them.

    What is left between the two is owed (the duals), and the penalty on it rises by a constant factor. In coordinates
    in which all inputs are of one size; weight (O, I). With 0 rounds: the signs of turned singular vectors.
    """
    wide_OI = weight_OI * inputs.sizes_I
    vectors_II, values_I = inputs.vectors_II, inputs.values_I
    left_OR, right_RI = _singular(wide_OI, inputs, rank, generator)
    near_left, near_right = Nearest(left_OR), Nearest(right_RI)
    owed_OR, owed_RI = torch.zeros_like(left_OR), torch.zeros_like(right_RI)
    pull_OI = wide_OI @ inputs.alike_II
    first, last = PENALTY
    for number in alike(range(rounds), weight_OI):
        penalty = first * (last / first) ** (number / max(rounds - 1, 1))
        other_RI = near_right.dense()
        matrix_RR = other_RI @ inputs.alike_II @ other_RI.T
        weight = penalty * matrix_RR.diagonal().mean().clamp(min=TINY)
        matrix_RR.diagonal().add_(weight)
        wanted_OR = pull_OI @ other_RI.T + weight * (near_left.dense() - owed_OR)
        owed_OR += wanted_OR @ torch.cholesky_inverse(torch.linalg.cholesky(matrix_RR))
        near_left = Nearest(owed_OR)
        owed_OR -= near_left.dense()
        other_OR = near_left.dense()
        matrix_RR = other_OR.T @ other_OR
        weight = penalty * matrix_RR.diagonal().mean().clamp(min=TINY)
        sizes_R, turn_RR = torch.linalg.eigh(matrix_RR)
        wanted_RI = other_OR.T @ pull_OI + weight * (near_right.dense() - owed_RI)
        wanted_RI = turn_RR.T @ wanted_RI @ vectors_II / (sizes_R.clamp(min=0)[:, None] * values_I + weight)
        owed_RI += turn_RR @ wanted_RI @ vectors_II.T
        near_right = Nearest(owed_RI)
        owed_RI -= near_right.dense()
    return Factors(
        near_left.signs, near_right.signs, near_left.rows, near_left.columns * near_right.rows,
        near_right.columns / inputs.sizes_I,
    )  # fmt: skip


class Nearest:
    """The signs of a matrix (A, B), and scales of rows (A,) and columns (B,) near to its numbers' sizes."""

    def __init__(self, numbers_AB: Float[Tensor, "A B"], rounds: int = 2) -> None:
        sizes_AB = numbers_AB.abs()
        self.signs = torch.where(numbers_AB < 0, -1.0, 1.0)
        self.columns = sizes_AB.mean(0)
        for _ in range(rounds):
            self.rows = sizes_AB @ self.columns / self.columns.square().sum().clamp(min=TINY)
            self.columns = self.rows @ sizes_AB / self.rows.square().sum().clamp(min=TINY)

    def dense(self) -> Float[Tensor, "A B"]:
        """Signs times scales, (A, B)."""
        return self.signs * self.rows[:, None] * self.columns


def sign_value(weight_OI: Float[Tensor, "O I"], importance_I: Float[Tensor, " I"], rounds: int) -> SignWeight:
    """The signs of a float32 weight (O, I), and values of outputs and inputs whose products are near to its sizes.

    A non-negative factorisation of |W| of rank 1 by alternating least squares (OneBit's SVID, arXiv 2402.11295, section
    3.2), in which a weight counts by the importance (I,) of its input. Raises ValueError as `factored`.
    """
    _check(weight_OI)
    sizes_I = (importance_I / divisor(importance_I.mean())).sqrt().clamp(min=LEAST_SIZE)
    near = Nearest(weight_OI * sizes_I, rounds)
    inputs_I = near.columns / sizes_I
    ratio = (near.rows.square().mean() / divisor(inputs_I.square().mean())).sqrt()
    ratio = torch.where(ratio > 0, ratio, 1.0).sqrt()  # both of one size, as their product allows
    return SignWeight.from_signs(near.signs, near.rows / ratio, inputs_I * ratio)


def _check(weight_OI: Tensor) -> None:
    """Raise ValueError for weights that are not finite or fit no 16-bit float."""
    largest = weight_OI.abs().max()
    if not bool(largest <= MOST):
        raise ValueError(f"a weight of size {float(largest):.3g} does not fit a 16-bit float")


def _singular(wide_OI: Tensor, inputs: Inputs, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Real factors (O, R) and (R, I) of the least output error, both of one size, turned at random."""
    stretch_I = inputs.values_I.sqrt()
    left_OM, sizes_M, right_MI = torch.linalg.svd(wide_OI @ inputs.vectors_II * stretch_I, full_matrices=False)
    roots_M = sizes_M[:rank].sqrt()
    turn_RR = torch.linalg.qr(torch.randn(rank, rank, generator=generator).to(wide_OI.device)).Q
    turn_MR = turn_RR[: len(roots_M)]
    right_MI = right_MI[:rank] / stretch_I @ inputs.vectors_II.T
    return left_OM[:, :rank] * roots_M @ turn_MR, turn_MR.T @ (roots_M[:, None] * right_MI)


def refitted(weight_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"], factors: Factors) -> Factors:
    """The same signs with scales of inputs, ranks and outputs, in turn, of least output error; (O, I) and (I, I)."""
    pull_OI = weight_OI @ moment_II
    dense_OI = factors.scaled_left_OR @ factors.right_RI
    inputs_I = _least_squares(dense_OI.T @ dense_OI * moment_II, (dense_OI * pull_OI).sum(0), factors.inputs_I)
    factors = replace(factors, inputs_I=inputs_I)
    left_OR, right_RI = factors.left_OR * factors.outputs_O[:, None], factors.scaled_right_RI
    matrix_RR = (left_OR.T @ left_OR) * (right_RI @ moment_II @ right_RI.T)
    side_R = ((left_OR.T @ pull_OI) * right_RI).sum(1)
    factors = replace(factors, ranks_R=_least_squares(matrix_RR, side_R, factors.ranks_R))
    dense_OI = factors.left_OR * factors.ranks_R @ factors.scaled_right_RI
    size_O = (dense_OI @ moment_II * dense_OI).sum(1)
    outputs_O = torch.where(size_O > 0, (dense_OI * pull_OI).sum(1) / size_O, factors.outputs_O)
    return replace(factors, outputs_O=outputs_O)


def _least_squares(matrix_NN: Tensor, side_N: Tensor, before_N: Tensor) -> Tensor:
    """What solves a positive semidefinite system; where its diagonal is 0, or it cannot be solved, what was before."""
    dead_N = matrix_NN.diagonal() == 0
    matrix_NN.diagonal().mul_(1 + 1e-6).add_(dead_N.float())
    side_N = torch.where(dead_N, before_N, side_N)
    factor_NN, wrong = torch.linalg.cholesky_ex(matrix_NN.double())
    if not bool(wrong == 0):
        return before_N
    return torch.cholesky_solve(side_N.double()[:, None], factor_NN)[:, 0].float()


def flipped(weight_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"], factors: Factors) -> Factors:
    """The same scales, signs after one round of descent on the output error, which never rises; (O, I) and (I, I)."""
    pull_OI = weight_OI @ moment_II
    left_OR, right_RI = factors.left_OR * factors.outputs_O[:, None], factors.scaled_right_RI * factors.ranks_R[:, None]
    matrix_RR = right_RI @ moment_II @ right_RI.T
    slope_OR = factors.outputs_O[:, None] * (left_OR @ matrix_RR - pull_OI @ right_RI.T)
    left_RO = _descended(factors.left_OR.T, slope_OR.T, matrix_RR, factors.outputs_O.square())
    factors = replace(factors, left_OR=left_RO.T.contiguous())
    left_OR, right_RI = factors.scaled_left_OR, factors.right_RI.clone()
    outer_RR = left_OR.T @ left_OR
    inner_II = moment_II * factors.inputs_I * factors.inputs_I[:, None]
    slope_RI = outer_RR @ right_RI @ inner_II - left_OR.T @ pull_OI * factors.inputs_I
    for start in alike(range(0, len(right_RI), TOGETHER), weight_OI):
        now, later = slice(start, start + TOGETHER), slice(start + TOGETHER, None)
        new_KI = _descended(right_RI[now].T, slope_RI[now].T, inner_II, outer_RR[now, now]).T
        with times(0.5):  # so many are left on the average
            slope_RI[later] += outer_RR[later, now] @ ((new_KI - right_RI[now]) @ inner_II)
        right_RI[now] = new_KI
    return replace(factors, right_RI=right_RI)


def _descended(signs_NK: Tensor, slope_NK: Tensor, inner_NN: Tensor, outer: Tensor) -> Tensor:
    """Signs (N, K) after one round of coordinate descent on tr(G S^T M S) - 2 tr(S^T T), that never rises.

    M is `inner_NN`, G `outer`, (K, K) or the (K,) of a diagonal one; `slope_NK` is half the derivative, M S G - T. All
    K signs of a row are looked at together: each turns that gains even if all turn, as G is at most diag(sum_l |G_kl|).
    """

    def by_outer(changes: Tensor) -> Tensor:
        return changes * outer if outer.ndim == 1 else changes @ outer

    bound_K = outer if outer.ndim == 1 else outer.abs().sum(1)
    signs_NK, slope_NK = signs_NK.clone(memory_format=torch.contiguous_format), slope_NK.contiguous()
    for start in alike(range(0, len(signs_NK), BATCH), signs_NK):
        now, later = slice(start, start + BATCH), slice(start + BATCH, None)
        batch_BK, wanted_BK, among_BB = signs_NK[now], slope_NK[now], inner_NN[now, now]
        changes_BK = torch.zeros_like(batch_BK)
        for number in alike(range(len(batch_BK)), signs_NK):
            gains_K = batch_BK[number] * wanted_BK[number] > bound_K * among_BB[number, number]
            changes_BK[number] = torch.where(gains_K, -2 * batch_BK[number], 0.0)
            wanted_BK[number + 1 :].addr_(among_BB[number + 1 :, number], by_outer(changes_BK[number]))
        batch_BK += changes_BK
        with times(0.5):
            slope_NK[later] += inner_NN[later, now] @ by_outer(changes_BK)
    return signs_NK
