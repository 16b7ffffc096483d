"""Vectors of the E8 lattice for a weight, chosen with error feedback (QuIP#, arXiv 2402.04396)."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.forms.lattice import DIM, TABLES, LatticeWeight, table
from cluscomp.forms.stored import in_16_bits
from cluscomp.forms.uniform import divisor
from cluscomp.kernels.lloyd import spatial_order
from cluscomp.solve.along_outputs import Wanted, best_factors, feedback
from cluscomp.solve.kmeans import nearest


def with_feedback(
    weight_OI: Float[Tensor, "O I"],
    moment_II: Float[Tensor, "I I"],
    *,
    width: int,
    narrow: int,
    scaled_outputs: bool,
) -> LatticeWeight:
    """Codes chosen 8 inputs at a time, each error handed on to the inputs still to come (block LDLQ).

    A vector is the one after which the output loses least, all later inputs being at their best; of two tables the
    second one's vector is chosen for what the first one's leaves. The scales are the weights' root mean square, and
    after the codes are known those of least output error.

    Args:
        weight_OI: (O, I) in float32, in rotated coordinates.
        moment_II: (I, I), the second moment of its inputs, positive definite (see `damped`).
        width: bits a number, 1 to 4.
        narrow: how many vectors, the first ones, have a bit a number less.
        scaled_outputs: one scale for each output, not one for all.
    """
    outputs, inputs = weight_OI.shape
    size_C = weight_OI.square().mean(1 if scaled_outputs else None).sqrt().view(-1)
    scales_C = divisor(in_16_bits(size_C).float())
    narrow_codes: list[list[Tensor]] = [[] for _ in TABLES[width - 1]]
    wide_codes: list[list[Tensor]] = [[] for _ in TABLES[width]]

    def choose(i: int, wanted: Wanted, factor_dd: Tensor) -> Tensor:
        wanted_Od = (wanted(i + len(factor_dd)) / scales_C).T
        few = min(max(narrow - i // DIM * outputs, 0), outputs)
        parts = [
            _vectors(wanted_Od[:few], factor_dd, width - 1, narrow_codes),
            _vectors(wanted_Od[few:], factor_dd, width, wide_codes),
        ]
        return torch.cat(parts).T * scales_C

    feedback(weight_OI.T.contiguous(), moment_II, choose, step=DIM)
    if weight_OI.is_meta:
        with weight_OI.device:
            return LatticeWeight.empty(
                out_features=outputs, in_features=inputs, width=width, narrow=narrow, scaled_outputs=scaled_outputs
            )
    form = LatticeWeight.from_codes(
        _joined(narrow_codes, weight_OI.device),
        _joined(wide_codes, weight_OI.device),
        scales_C,
        out_features=outputs,
        in_features=inputs,
        width=width,
        narrow=narrow,
    )
    factors_C = best_factors(weight_OI, form(torch.float32).detach(), moment_II, len(size_C))
    form.scales.data = in_16_bits(scales_C * factors_C)
    return form


def _vectors(wanted_Nd: Tensor, factor_dd: Tensor, width: int, codes: list[list[Tensor]]) -> Tensor:
    """The vectors (N, d) of the tables of a width chosen for what is wanted (N, d); adds their codes to each list."""
    chosen_Nd = torch.zeros_like(wanted_Nd)
    if not len(wanted_Nd):
        return chosen_Nd
    for (name, scale), found in zip(TABLES[width], codes):
        vectors_Kd = scale * table(name, wanted_Nd.device)[:, : len(factor_dd)]
        both_dM = torch.cat([wanted_Nd - chosen_Nd, vectors_Kd]).T
        bent_Md = torch.linalg.solve_triangular(factor_dd.T, both_dM, upper=False).T.contiguous()
        order_K = None if wanted_Nd.is_cuda or len(factor_dd) < DIM else _order(name)
        found.append(nearest(bent_Md[: len(wanted_Nd)], bent_Md[len(wanted_Nd) :], order_K))
        chosen_Nd = chosen_Nd + vectors_Kd[found[-1].long()]
    return chosen_Nd


@cache
def _order(name: str) -> Tensor | None:
    """A spatial order of a table, which bent by a factor lies about as it is."""
    return spatial_order(table(name, torch.device("cpu")))


def _joined(codes: list[list[Tensor]], device: torch.device) -> list[Tensor]:
    """For each table its codes (N,), of all inputs."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    return [torch.cat([none, *found]) for found in codes]
