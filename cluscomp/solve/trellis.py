"""Paths through a trellis for a weight, tile by tile, errors handed on (QTIP, arXiv 2406.11235)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cluscomp.forms.stored import in_16_bits
from cluscomp.forms.trellis import TrellisWeight, tile_count
from cluscomp.forms.uniform import divisor
from cluscomp.kernels.trellis import Code, best_paths, code_values
from cluscomp.solve.along_outputs import Wanted, best_factors, feedback

# by bits a number, for Gaussian numbers and states of 12 bits, both codes: measured, 0.01 more or less loses nothing
SPREAD = (0.87, 1.02, 1.1, 1.14, 1.2, 1.25)


def with_feedback(
    weight_OI: Float[Tensor, "O I"],
    moment_II: Float[Tensor, "I I"],
    *,
    tile_outputs: int,
    tile_inputs: int,
    state_bits: int,
    width: int,
    narrow: int,
    code: Code,
    scaled_outputs: bool,
) -> TrellisWeight:
    """Paths chosen a column of tiles at a time, each error handed on to the inputs still to come (block LDLQ).

    Inside a tile all numbers count alike, as the paper has it: a rotated second moment is nearly the same for all. The
    scales are the weights' root mean square times what the code wants at this rate, and after the paths are known those
    of least output error.

    Args:
        weight_OI: (O, I) in float32, in rotated coordinates.
        moment_II: (I, I), the second moment of its inputs, positive definite (see `damped`).
        tile_outputs: outputs of a tile.
        tile_inputs: inputs of a tile.
        state_bits: L.
        width: k, bits a number.
        narrow: how many tiles, the first ones, have k - 1: the inputs that come first are corrected by most others.
        code: what states stand for.
        scaled_outputs: one scale for each output, not one for all.
    """
    outputs, inputs = weight_OI.shape
    values_N = code_values(state_bits, code, weight_OI.device)
    rows = math.ceil(outputs / tile_outputs)
    size_S = weight_OI.square().mean(1 if scaled_outputs else None).sqrt().view(-1)
    tiles = tile_count(outputs, inputs, tile_outputs, tile_inputs)
    spread = _spread(width, narrow / tiles) / float(values_N.std())
    scales_S = divisor(in_16_bits(size_S * spread).float())
    narrow_states, wide_states = [], []

    def choose(i: int, wanted: Wanted, factor_ii: Tensor) -> Tensor:
        wanted_io = wanted(i + len(factor_ii)) / scales_S
        padded_io = F.pad(wanted_io, (0, -outputs % tile_outputs, 0, tile_inputs - len(factor_ii)))
        tiles_AT = padded_io.view(tile_inputs, rows, tile_outputs).transpose(0, 1).reshape(rows, -1)
        few = min(max(narrow - i // tile_inputs * rows, 0), rows)
        found = []
        if few and width == 1:
            found.append(torch.zeros_like(tiles_AT[:few]))
        elif few:
            narrow_states.append(best_paths(tiles_AT[:few], values_N, width - 1))
            found.append(values_N[narrow_states[-1].long()])
        if few < rows:
            wide_states.append(best_paths(tiles_AT[few:], values_N, width))
            found.append(values_N[wide_states[-1].long()])
        chosen_io = torch.cat(found).view(rows, tile_inputs, tile_outputs).transpose(0, 1).flatten(1)
        return chosen_io[: len(factor_ii), :outputs] * scales_S

    feedback(weight_OI.T.contiguous(), moment_II, choose, step=tile_inputs)
    spec: dict[str, Any] = {
        "out_features": outputs, "in_features": inputs, "tile_outputs": tile_outputs, "tile_inputs": tile_inputs,
        "state_bits": state_bits, "width": width, "narrow": narrow, "code": code,
    }  # fmt: skip
    if weight_OI.is_meta:
        with weight_OI.device:
            return TrellisWeight.empty(**spec, scaled_outputs=scaled_outputs)
    form = TrellisWeight.from_states(
        torch.cat(narrow_states) if narrow_states else None,
        torch.cat(wide_states) if wide_states else None,
        scales_S,
        **spec,
    )
    factors_S = best_factors(weight_OI, form(torch.float32).detach(), moment_II, len(size_S))
    form.scales.data = in_16_bits(scales_S * factors_S)
    return form


def _spread(width: int, share: float) -> float:
    """The best scale for Gaussian numbers, a `share` of them with a bit less, in root mean squares of both sides."""
    here, below = (SPREAD[min(max(bits, 1), len(SPREAD)) - 1] for bits in (width, width - 1))
    return (1 - share) * here + share * below
