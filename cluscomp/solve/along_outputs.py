"""Codes and codebooks chosen by what a layer's output loses, tr(E H E^T), instead of the weight's own error.

E is the weight's error (O, I) and H = X^T X / tokens the second moment of the layer's inputs, so tr(E H E^T) is the
mean squared error of the output over the calibration tokens, summed over the outputs. Everything here stays within the
bytes K-means has spent, and works for axis "out" (the paper's): a sub-vector's entries share one input, and
codes_IG[i, g] stands for outputs g D to g D + D - 1 of input i.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cluscomp.kernels.codebook import gradient, rebuild
from cluscomp.kernels.counting import alike, report, times
from cluscomp.kernels.feedback import Feedback
from cluscomp.kernels.work import Work

BATCH = 64  # inputs whose feedback is gathered before it reaches the rest of the weight
PIECE = 1024  # rows of a matrix that are turned around at once
SMALL = 64  # inputs of a triangular matrix that is inverted at once
ROSE = 1e6  # times the least residual: it was of rounding errors, and the steps since followed them
DAMPING = "a larger method.damping, or more cluster.samples"  # what helps a moment that cannot be inverted

Wanted = Callable[[int], Tensor]
Choose = Callable[[int, Wanted, Tensor], Tensor]


def output_error(error_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"]) -> float:
    """tr(E H E^T) of (O, I) and (I, I), the mean squared error of the outputs summed over them."""
    return float(((error_OI @ moment_II) * error_OI).double().sum())


def best_factors(
    weight_OI: Float[Tensor, "O I"], dense_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"], number: int
) -> Float[Tensor, " S"]:
    """By what to multiply a stored weight (O, I) for the least output error: (1,), or (O,) for each output.

    0 where it would have to be less.
    """
    bent_OI = dense_OI @ moment_II
    pull_O, size_O = (bent_OI * weight_OI).sum(1), (bent_OI * dense_OI).sum(1)
    if number == 1:
        pull_O, size_O = pull_O.sum()[None], size_O.sum()[None]
    return torch.where(size_O > 0, pull_O / size_O, 0.0).clamp(min=0)


def damped(moment_II: Float[Tensor, "I I"], damping: float, shrinkage: float = 0.0) -> Float[Tensor, "I I"]:
    """H with `damping` times its mean diagonal added to the diagonal, (I, I); inputs never seen count as that, too.

    Before, what is beside the diagonal is made smaller by a share `shrinkage`: of few tokens it is mostly chance.
    (Ledoit and Wolf, 2004, shrink towards a multiple of the identity.)
    """
    mean = float(moment_II.diagonal().mean())
    damped_II = moment_II.clone()
    if shrinkage:
        damped_II.mul_(1 - shrinkage).diagonal().copy_(moment_II.diagonal())
    damped_II.diagonal().add_(damping * mean if mean else 1.0)
    return damped_II


@contextmanager
def invertible(helps: str = DAMPING) -> Iterator[None]:
    """Raise ValueError, with what helps, where a second moment turns out not to be positive definite."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"the second moment of its inputs cannot be inverted: take {helps}") from error


def inverse_factor(moment_II: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The upper Cholesky factor (I, I) of H's inverse, made in float64 and given in `dtype`.

    Its rows are what is left of the inverse when the inputs before are fixed. H itself is not inverted: from its last
    input to its first it is R R^T with R upper triangular, and the factor is the inverse of R. Raises ValueError if H
    is not positive definite.
    """
    # all in one matrix, column by column in memory: at 28,672 inputs it takes 6.6 GB
    factor_II = moment_II.new_empty(moment_II.shape, dtype=torch.float64).mT
    _backwards(moment_II, factor_II)
    del moment_II  # which may have no other name
    with invertible():
        torch.linalg.cholesky(factor_II, out=factor_II)
    _invert(factor_II)
    found_II = factor_II.new_empty(factor_II.shape, dtype=dtype)
    _backwards(factor_II, found_II)
    return found_II


def _backwards(matrix_II: Tensor, into_II: Tensor) -> None:
    """Copy a matrix (I, I) into another from its last row and column to its first, in pieces: no whole one beside."""
    inputs = len(matrix_II)
    for start in range(0, inputs, PIECE):
        end = min(start + PIECE, inputs)
        into_II[start:end] = matrix_II[inputs - end : inputs - start].flip(0, 1)


def _invert(lower_II: Tensor) -> None:
    """Put the inverse of a lower triangular matrix (I, I) in its place: halves first, and then what is beside them."""
    if len(lower_II) <= SMALL:
        identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
        lower_II.copy_(torch.linalg.solve_triangular(lower_II, identity_II, upper=False))
        return
    half = len(lower_II) // 2
    first, below, second = lower_II[:half, :half], lower_II[half:, :half], lower_II[half:, half:]
    _invert(first)
    _invert(second)
    torch.mm(second, below @ first, out=below).neg_()


def feedback(
    weight_IO: Float[Tensor, "I O"], moment_II: Float[Tensor, "I I"], choose: Choose, *, step: int = 1
) -> None:
    """Have values chosen for a weight (I, O), `step` inputs at a time, each error handed on to the inputs to come.

    The column rule of GPTQ (arXiv 2210.17323, Algorithm 1): after some inputs have their values, the best correction of
    the others is taken from H's inverse. `moment_II` is positive definite (see `damped`). In turn
    `choose(i, wanted, factor)` says what inputs i to i + step - 1 will be, (step, O): `wanted(j)` gives what is best
    for inputs i to j - 1 after the corrections, (j - i, O). With all later inputs at their best, values v cost an
    output |(w - v) factor^-1|^2, w being what is wanted of them; `factor` (step, step) is upper triangular.
    """
    inputs = len(weight_IO)
    factor_II = inverse_factor(moment_II, weight_IO.dtype)
    left_IO = weight_IO.clone()
    if weight_IO.is_meta:  # one round stands for all, amid a batch
        errors_IO = torch.empty_like(left_IO[: min(BATCH // 2, inputs)])
        report(Work(flops=1.0 * inputs * weight_IO.numel()))
        with times(math.ceil(inputs / step)):
            factor_DD = factor_II[:step, :step]
            best = lambda j: left_IO[:j] - factor_II[: len(errors_IO), :j].T @ errors_IO  # noqa: E731
            error_DO = best(step) - choose(0, best, factor_DD)
            errors_IO[:step] = torch.linalg.solve_triangular(factor_DD.T, error_DO, upper=False)
        return
    batch = max(BATCH // step, 1) * step
    for start in range(0, inputs, batch):
        end = min(start + batch, inputs)
        errors_IO = torch.zeros_like(left_IO[start:end])
        for i in range(start, end, step):
            stop = min(i + step, end)

            def wanted(j: int, i: int = i, start: int = start, errors_IO: Tensor = errors_IO) -> Tensor:
                corrections_IO: Tensor = factor_II[start:i, i:j].T @ errors_IO[: i - start]
                return left_IO[i:j] - corrections_IO

            factor_DD, best_DO = factor_II[i:stop, i:stop], wanted(stop)
            known = partial(_known, stop, best_DO, wanted)
            error_DO = best_DO - choose(i, known, factor_DD)
            errors_IO[i - start : stop - start] = torch.linalg.solve_triangular(factor_DD.T, error_DO, upper=False)
        left_IO[end:] -= factor_II[start:end, end:].T @ errors_IO


def _known(stop: int, best_DO: Tensor, wanted: Wanted, j: int) -> Tensor:
    """What is wanted of the inputs up to j, which is known up to `stop`."""
    return best_DO if j == stop else wanted(j)


def feedback_codes(
    weight_IO: Float[Tensor, "I O"], centroids_KD: Float[Tensor, "K D"], moment_II: Float[Tensor, "I I"]
) -> Int[Tensor, "I G"]:
    """Codes (I, ceil(O / D)) of axis "out" chosen as in `feedback`, a vector of the codebook for D outputs of an input.

    Inputs come in the order of falling mean square. `moment_II` is positive definite (see `damped`).
    """
    inputs, outputs = weight_IO.shape
    order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    ordered = [moment_II[order_I][:, order_I]]
    del moment_II  # neither has a name while the factor is made: at 28,672 inputs each takes 3.3 GB
    factor_II = inverse_factor(ordered.pop(), weight_IO.dtype)
    left_IP = _padded(weight_IO[order_I], centroids_KD)
    codes_IG, search = _no_codes(left_IP, centroids_KD), Feedback(centroids_KD, outputs)
    for start in alike(range(0, inputs, BATCH), weight_IO):
        now, later = slice(start, start + BATCH), slice(start + BATCH, None)
        codes_IG[order_I[now]], errors_BO = search.choose(left_IP[now], factor_II[now, now])
        with times(0.5):  # so many are left on the average
            left_IP[later, :outputs].addmm_(factor_II[now, later].T, errors_BO, alpha=-1)
    return codes_IG


def descend_codes(
    weight_IO: Float[Tensor, "I O"],
    codes_IG: Int[Tensor, "I G"],
    centroids_KD: Float[Tensor, "K D"],
    moment_II: Float[Tensor, "I I"],
) -> Int[Tensor, "I G"]:
    """Codes (I, ceil(O / D)) after one round of coordinate descent on tr(E H E^T), which never rises.

    Input by input each code is chosen anew with all other codes fixed: the best row would be the present one plus
    (H E)_i / H_ii, and the nearest centroids to it are the best codes (the rule of CDQuant, arXiv 2406.17542, in order,
    with a vector of the codebook in the place of a rounded number). In a padded group the padding wants to stay as it
    is, so that nothing is lost there, and not all is gained. Shapes as in `feedback_codes`.
    """
    outputs = weight_IO.shape[1]
    codes, search = codes_IG.clone(), Feedback(centroids_KD, outputs)
    rows_IP = centroids_KD[codes.long()].flatten(1)
    error_IO = weight_IO - rows_IP[:, :outputs]
    for start in alike(range(0, len(weight_IO), BATCH), weight_IO):
        now = slice(start, start + BATCH)
        diagonal_B = moment_II[now, now].diagonal()
        wanted_BP = rows_IP[now].clone()
        wanted_BP[:, :outputs] += moment_II[now] @ error_IO / diagonal_B[:, None]
        factor_BB = -moment_II[now, now] / diagonal_B
        factor_BB.diagonal().fill_(1)
        codes[now], changes_BO = search.choose(wanted_BP, factor_BB, rows_IP[now])
        error_IO[now] += changes_BO
    return codes


def _padded(weight_IO: Tensor, centroids_KD: Tensor) -> Tensor:
    """A weight (I, O) with outputs of zeros behind it, (I, P), so that the last sub-vectors are whole."""
    return torch.nn.functional.pad(weight_IO, (0, -weight_IO.shape[1] % centroids_KD.shape[1]))


def _no_codes(left_IP: Tensor, centroids_KD: Tensor) -> Tensor:
    return left_IP.new_empty(len(left_IP), left_IP.shape[1] // centroids_KD.shape[1], dtype=torch.int32)


@dataclass(frozen=True)
class Coded:
    """A weight (I, O), its codes (I, ceil(O / D)), packed, and the second moment (I, I) of its inputs."""

    weight_IO: Float[Tensor, "I O"]
    packed: UInt8[Tensor, " bytes"]
    moment_II: Float[Tensor, "I I"]


def least_squares_codebook(
    layers: Sequence[Coded], bits: int, centroids_KD: Float[Tensor, "K D"], steps: int, enough: float = 0.0
) -> Float[Tensor, "K D"]:
    """The codebook (K, D) that minimises the sum of the layers' tr(E H E^T), codes fixed, from `centroids_KD` on.

    A linear least-squares problem in the codebook: conjugate gradients with the diagonal of its matrix as
    preconditioner, at most `steps` of them (`enough`: see `conjugate_gradients`), each one product of H with a dense
    weight for each layer. The D columns do not touch each other, so each has its own step length. Centroids no code
    points to stay.
    """
    size, dim = centroids_KD.shape

    def gather(values: Callable[[Coded], Tensor]) -> Tensor:
        return reduce(add, (gradient(values(layer), layer.packed, bits, size, dim) for layer in layers))

    def dense(layer: Coded, codebook_KD: Tensor) -> Tensor:
        return rebuild(codebook_KD, layer.packed, bits, *layer.weight_IO.shape)

    def times_matrix(codebook_KD: Tensor) -> Tensor:
        return gather(lambda layer: layer.moment_II @ dense(layer, codebook_KD))

    start_KD = centroids_KD.float()
    mass_KD = gather(lambda layer: layer.moment_II.diagonal()[:, None].expand(layer.weight_IO.shape).contiguous())
    residual_KD = gather(lambda layer: layer.moment_II @ (layer.weight_IO - dense(layer, start_KD)))
    return conjugate_gradients(start_KD, residual_KD, mass_KD, times_matrix, steps, enough, apart=True)


def conjugate_gradients(
    start: Tensor,
    residual: Tensor,
    diagonal: Tensor,
    times_matrix: Callable[[Tensor], Tensor],
    steps: int,
    enough: float = 0.0,
    *,
    apart: bool = False,
) -> Tensor:
    """The minimum of a quadratic form after at most `steps` of conjugate gradients, from `start` on; all of one shape.

    A step that lowers the form by no more than a share `enough` of what all did so far is the last. Where the matrix is
    singular, as with codebooks that are added up, steps along rounding errors grow without bounds: when the residual
    has risen by so much, what was there at its least counts.

    `residual` is the form's negative gradient at the start, `times_matrix` its matrix times a direction, and `diagonal`
    (not negative) a part of the matrix' diagonal, the preconditioner; where it is 0 the start stays. `apart`: the
    columns, along the last dimension, do not touch each other, and each has its own step length.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(0) if apart else (a * b).sum()

    tiny = torch.finfo(torch.float32).tiny
    x, scale = start, torch.where(diagonal > 0, 1 / diagonal, 0)
    direction = scale * residual
    size = first = product(residual, direction)
    gained = 0.0
    if start.is_meta and steps:  # one step stands for all
        with times(steps / 2 if enough else steps):
            return x + size / product(direction, times_matrix(direction)) * direction
    least, best = float(first.sum()), x
    for _ in range(steps):
        if bool((size <= 1e-10 * first).all()):
            break
        bent = times_matrix(direction)
        length = size / product(direction, bent).clamp(min=tiny)
        x = x + length * direction
        gained += (gain := float((length * size).sum()))
        if gain <= enough * gained:
            break
        residual = residual - length * bent
        scaled = scale * residual
        before, size = size, product(residual, scaled)
        direction = scaled + size / before.clamp(min=tiny) * direction
        if (total := float(size.sum())) < least:
            least, best = total, x
        elif total > ROSE * least:
            return best
    return x
