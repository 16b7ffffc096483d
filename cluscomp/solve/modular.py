"""Modular decomposition of a block: which units of an MLP and which dimensions of heads stay (MoDeGPT).

Lin et al., arXiv 2408.09632: type I, the Nystrom approximation of an MLP; type II, CR decomposition of query and key;
type III, SVD of value and output; and how much of each block goes. Second moments are means over tokens; all is
computed in float64.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cluscomp.solve.along_outputs import damped, invertible

TINY = 1e-6  # of the mean diagonal: what makes a moment of too few tokens one that can be inverted
MOST = 0.8  # of a block's units that go at the most, where blocks differ


def influence(entering_BTH: Float[Tensor, "B T H"], leaving_BTH: Float[Tensor, "B T H"]) -> float:
    """How far a block turns its inputs: 1 - cos(x, y), the mean over tokens (block influence)."""
    return 1 - float(torch.cosine_similarity(entering_BTH.double(), leaving_BTH.double(), dim=-1).mean())


def widths(influences: Sequence[float], width: int, left: int, temperature: float) -> list[int]:
    """How many of `width` units stay in each block, `left` of them on average: most where influence is most.

    What goes is as exp(-influence / temperature): the least influence that goes, less `temperature` times the entropy
    of what goes (entropy-regularised allocation). None loses more than the share `MOST`; the others take on the rest.
    `left` is no less than what that leaves.
    """
    total, most = len(influences) * (width - left), int(MOST * width)
    free, gone = dict(enumerate(influences)), dict.fromkeys(range(len(influences)), float(most))
    while free:
        least, rest = min(free.values()), total - most * (len(influences) - len(free))
        parts = {block: math.exp((least - each) / temperature) for block, each in free.items()}
        gone |= {block: rest * part / sum(parts.values()) for block, part in parts.items()}
        over = {block for block in free if gone[block] > most}
        if not over:
            break
        gone |= dict.fromkeys(over, float(most))
        free = {block: each for block, each in free.items() if block not in over}
    whole = {block: int(each) for block, each in gone.items()}
    by_rest = sorted(gone, key=lambda block: whole[block] - gone[block])
    for block in by_rest[: total - sum(whole.values())]:
        whole[block] += 1
    return [width - whole[block] for block in range(len(influences))]


def units(moment_WW: Float[Tensor, "W W"], count: int, ridge: float) -> Int[Tensor, " K"]:
    """The `count` units of an MLP with the largest ridge leverage scores, in their order: (K,).

    The score is diag(C (C + ridge I)^-1), `ridge` as a share of the mean of C's diagonal: how little the other units
    tell of a unit. C, (W, W), is the second moment of what enters the MLP's last layer.
    """
    with invertible("a larger decompose.ridge, or more decompose.samples"):
        inverse_WW = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment_WW.double(), ridge)))
    kept_K: Tensor = inverse_WW.diagonal().topk(count, largest=False).indices.sort().values
    return kept_K


def nystrom(weight_OW: Float[Tensor, "O W"], moment_WW: Float[Tensor, "W W"], kept_K: Tensor) -> Float[Tensor, "O K"]:
    """The last layer of an MLP for the units that are kept (K,): W C_:K C_KK^-1, (O, K).

    Of all weights (O, K) those with the least squared error of the outputs.
    """
    moment_WK = moment_WW.double()[:, kept_K]
    factor_KK = _root(moment_WK[kept_K])
    reading_OK: Tensor = torch.cholesky_solve((weight_OW.double() @ moment_WK).T, factor_KK).T
    return reading_OK


def pairs(queries_ND: Float[Tensor, "N D"], keys_GD: Float[Tensor, "G D"]) -> Float[Tensor, " P"]:
    """What the pairs of dimensions that rotate together add to the scores of attention: (P,), D = 2 P.

    The mean squares of N query heads' dimensions, times those of the key head that they share, and of both dimensions
    and all heads the sum: the square of what CR decomposition sorts by, the product of the columns' norms.
    """
    shared_GND = queries_ND.double().view(len(keys_GD), -1, keys_GD.shape[1])
    return (shared_GND * keys_GD.double()[:, None]).sum((0, 1)).view(2, -1).sum(0)


def common(
    moment_DD: Float[Tensor, "D D"], outputs_MD: Float[Tensor, "M D"], count: int
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "D K"]]:
    """The best `count` dimensions for D values: what makes them, (K, D), and what makes the values again, (D, K).

    `moment_DD` is the values' second moment, `outputs_MD` the columns of the output layers that read them, of all query
    heads that share them: the error of the outputs is the least there is (an SVD of both together).
    """
    factor_DD = _root(moment_DD.double())
    gram_DD = outputs_MD.double().T @ outputs_MD.double()
    basis_DK = torch.linalg.eigh(factor_DD.T @ gram_DD @ factor_DD).eigenvectors.flip(1)[:, :count]
    return torch.linalg.solve_triangular(factor_DD, basis_DK.T, upper=False, left=False), factor_DD @ basis_DK


def _root(moment_NN: Tensor) -> Tensor:
    """The Cholesky factor of a second moment (N, N); of float32 numbers TINY may be too little."""
    try:
        return torch.linalg.cholesky(damped(moment_NN, TINY))  # type: ignore[no-any-return]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        with invertible("more decompose.samples"):
            return torch.linalg.cholesky(damped(moment_NN, 100 * TINY))  # type: ignore[no-any-return]


def energy(weight_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"]) -> float:
    """The mean squared size of a layer's outputs, or with the difference of two weights (O, I) of their error."""
    weight_OI = weight_OI.double()
    return float(((weight_OI @ moment_II.double()) * weight_OI).sum())
