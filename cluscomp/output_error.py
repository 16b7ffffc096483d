"""Codes and codebooks chosen by what a layer's output loses, tr(E H E^T), instead of the weight's own error.

E is the weight's error (O, I) and H = X^T X / tokens the second moment of the layer's inputs, so tr(E H E^T) is the
mean squared error of the output over the calibration tokens, summed over the outputs. Everything here stays within the
bytes K-means has spent, and works for axis "out" (the paper's): a sub-vector's entries share one input, and
codes_IG[i, g] stands for outputs g D to g D + D - 1 of input i.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cluscomp.kernels.codebook import gradient, rebuild

BATCH = 64  # inputs whose feedback is gathered before it reaches the rest of the weight

Nearest = Callable[[Float[Tensor, "N D"], Float[Tensor, "K D"]], Int[Tensor, " N"]]


def output_error(error_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"]) -> float:
    """tr(E H E^T) of (O, I) and (I, I), the mean squared error of the outputs summed over them."""
    return float(((error_OI @ moment_II) * error_OI).double().sum())


def damped(moment_II: Float[Tensor, "I I"], damping: float) -> Float[Tensor, "I I"]:
    """H with `damping` times its mean diagonal added to the diagonal, (I, I); inputs never seen count as that, too."""
    mean = float(moment_II.diagonal().mean())
    return moment_II + torch.eye(len(moment_II), device=moment_II.device) * (damping * mean if mean else 1.0)


def feedback_codes(
    weight_IO: Float[Tensor, "I O"],
    centroids_KD: Float[Tensor, "K D"],
    moment_II: Float[Tensor, "I I"],
    nearest: Nearest,
) -> Int[Tensor, "I G"]:
    """Codes (I, ceil(O / D)) chosen input by input, each error handed on to the inputs still to come.

    The column rule of GPTQ (arXiv 2210.17323, Algorithm 1), with a vector of the codebook in the place of a rounded
    number: after input i is coded, the best correction of the others is taken from H's inverse. Inputs come in the
    order of falling mean square. `moment_II` is positive definite (see `damped`), `nearest` gives each row's centroid.
    """
    inputs, outputs = weight_IO.shape
    dim = centroids_KD.shape[1]
    order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    # the rows of the inverse's Cholesky factor are what is left of the inverse when the inputs before are fixed
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(moment_II[order_I][:, order_I].double()))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True).to(weight_IO.dtype)
    left_IO = torch.nn.functional.pad(weight_IO[order_I], (0, -outputs % dim))
    codes_IG = torch.empty(inputs, left_IO.shape[1] // dim, dtype=torch.int32, device=weight_IO.device)
    for start in range(0, inputs, BATCH):
        end = min(start + BATCH, inputs)
        errors_IO = torch.zeros_like(left_IO[start:end])
        for i in range(start, end):
            wanted_O = left_IO[i] - factor_II[start:i, i] @ errors_IO[: i - start]
            codes_IG[i] = nearest(wanted_O.view(-1, dim), centroids_KD)
            error_O = torch.sub(wanted_O, centroids_KD[codes_IG[i].long()].flatten(), out=errors_IO[i - start])
            error_O /= factor_II[i, i]
            error_O[outputs:] = 0  # of the padding
        left_IO[end:] -= factor_II[start:end, end:].T @ errors_IO
    codes = torch.empty_like(codes_IG)
    codes[order_I] = codes_IG
    return codes


@dataclass(frozen=True)
class Coded:
    """A weight (I, O), its codes (I, ceil(O / D)), packed, and the second moment (I, I) of its inputs."""

    weight_IO: Float[Tensor, "I O"]
    packed: UInt8[Tensor, " bytes"]
    moment_II: Float[Tensor, "I I"]


def least_squares_codebook(
    layers: Sequence[Coded], bits: int, centroids_KD: Float[Tensor, "K D"], steps: int
) -> Float[Tensor, "K D"]:
    """The codebook (K, D) that minimises the sum of the layers' tr(E H E^T), codes fixed, from `centroids_KD` on.

    A linear least-squares problem in the codebook: conjugate gradients with the diagonal of its matrix as
    preconditioner, at most `steps` of them, each one product of H with a dense weight for each layer. The D columns do
    not touch each other, so each has its own step length. Centroids no code points to stay.
    """
    size, dim = centroids_KD.shape

    def gather(values: Callable[[Coded], Tensor]) -> Tensor:
        return reduce(add, (gradient(values(layer), layer.packed, bits, size, dim) for layer in layers))

    def dense(layer: Coded, codebook_KD: Tensor) -> Tensor:
        return rebuild(codebook_KD, layer.packed, bits, *layer.weight_IO.shape)

    def bend(codebook_KD: Tensor) -> Tensor:
        return gather(lambda layer: layer.moment_II @ dense(layer, codebook_KD))

    x_KD = centroids_KD.float()
    mass_KD = gather(lambda layer: layer.moment_II.diagonal()[:, None].expand(layer.weight_IO.shape).contiguous())
    scale_KD = torch.where(mass_KD > 0, 1 / mass_KD, 0)
    residual_KD = gather(lambda layer: layer.moment_II @ (layer.weight_IO - dense(layer, x_KD)))
    direction_KD = scale_KD * residual_KD
    size_D = (residual_KD * direction_KD).sum(0)
    first_D = size_D
    for _ in range(steps):
        if bool((size_D <= 1e-10 * first_D).all()):
            break
        bent_KD = bend(direction_KD)
        length_D = size_D / (direction_KD * bent_KD).sum(0).clamp(min=torch.finfo(torch.float32).tiny)
        x_KD = x_KD + length_D * direction_KD
        residual_KD = residual_KD - length_D * bent_KD
        scaled_KD = scale_KD * residual_KD
        before_D, size_D = size_D, (residual_KD * scaled_KD).sum(0)
        direction_KD = scaled_KD + size_D / before_D.clamp(min=torch.finfo(torch.float32).tiny) * direction_KD
    return x_KD
