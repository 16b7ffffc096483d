"""WaterSIC: whole numbers coded by their entropy, with a step for each input (ICML 2026, egorlifar/watersic)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluscomp import solve
from cluscomp.errors import named
from cluscomp.methods import Compressed
from cluscomp.methods.each_layer import with_moments
from cluscomp.settings import settings

if TYPE_CHECKING:
    from cluscomp.solve.allocate import Menu
    from cluscomp.solve.layer import Layer
    from cluscomp.solve.water_filling import WaterFilling

LEAST_BITS = 0.25


@settings
class WaterSic:
    """Round with error feedback to whole numbers of a scale for each input, and write them by their entropy.

    An input's step is c d_i, d being the diagonal of the upper Cholesky factor of the inverse of the second moment (to
    whose diagonal `damping` is added, as a share of its mean) with inputs in the order of falling mean square: so all
    inputs are left with one error in what the output sees. c is searched, so that a weight takes nearly `bits` bits and
    never more, tables and scales included. Each input's scale is the one that fits its numbers best; when all numbers
    are known the scales are solved for together, `refits` times.

    `allocation` "uniform" gives every matrix `bits`; "fill" shares those of a block out by the relative errors of the
    outputs, with no less than a share `floor` of them for a matrix. `scaled_outputs`: 16 bits more for each output, a
    scale that is solved for in turn with the inputs'. `states` 8 is not WaterSIC's: levels of a quantiser with eight
    states in the place of whole numbers, chosen for all outputs of an input together (kernels/dependent.py).

    Unlike the authors': rANS in the place of Huffman's code, tables by the spread of inputs and outputs, relative
    errors in the place of one c for the model; nothing is corrected for the drift of inputs or weighted by attention.
    """

    bits: float = Field(ge=LEAST_BITS, le=8)
    allocation: Literal["uniform", "fill"]
    floor: float = Field(ge=0, le=1)
    damping: float = Field(gt=0, le=1)
    states: Literal[1, 8]
    scaled_outputs: bool
    refits: int = Field(ge=0)

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs."""
        return frozenset({"moment"})

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Layer after layer; see `Method.compress`."""
        methods = [self] * len(layers)
        if self.allocation == "fill" and len(layers) > 1:
            methods = [
                replace(self, **option.settings)
                for option in solve.allocate.share_out([*self.offers(layers)], self.bits)
            ]
        for (name, opened), method in zip(self._opened(layers), methods):
            with named([name]):
                stored = opened.stored(method.bits)
            yield Compressed({name: stored}, {"bits": method.bits} if self.allocation == "fill" else {})

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """By errors measured on each weight, or on some of its outputs; see `methods.Offers`."""
        for name, opened in self._opened(layers):
            with named([name]):
                errors = opened.errors(self.bits)
            yield solve.allocate.rates_menu(name, layers[name], errors, self.bits, self.floor, LEAST_BITS)

    def _opened(self, layers: "dict[str, Layer]") -> "Iterator[tuple[str, WaterFilling]]":
        """One layer after the other, made ready."""
        for name, curvature in with_moments(layers, self.damping, solve.water_filling.Curvature):
            yield (
                name,
                solve.water_filling.WaterFilling(
                    layers[name].weight_OI.float(),
                    curvature,
                    dependent=self.states > 1,
                    scaled_outputs=self.scaled_outputs,
                    refits=self.refits,
                ),
            )
