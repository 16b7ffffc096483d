"""SLiM-Quant: one symmetric grid for a matrix, as wide as a histogram of its weights likes best (arXiv 2410.09615)."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cluscomp import solve
from cluscomp.methods.each_layer import EachLayer
from cluscomp.methods.on_grids import check_choice, grid_of
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.uniform import UniformWeight
    from cluscomp.solve.layer import Seen


@settings
class SlimQuant(EachLayer):
    """Round to a symmetric grid that is clipped where the expected squared error of rounding and clipping is least.

    Either `bits` is given, the most bits per weight that may be stored, and numbers are as wide as that allows; or
    their `width` by hand. The error is that of a histogram of the weights of `bins` bins; where it is least is looked
    for at ten places, then between the neighbours of the best.

    Unlike the authors': the one scale is stored for each output, where it can learn by itself (16 bits an output).
    Mask and adapter stand beside it (`Beside`).
    """

    bits: float | None = Field(ge=1, le=8)
    width: int | None = Field(ge=1, le=8)
    bins: int = Field(ge=16)

    @model_validator(mode="after")
    def _either_bits_or_width(self) -> "SlimQuant":
        check_choice(self.bits, width=self.width)
        return self

    def sees(self) -> frozenset[str]:
        """Nothing: no text is read."""
        return frozenset()

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "UniformWeight":
        """Round a weight (O, I); see `EachLayer.stored`."""
        outputs, inputs = weight_OI.shape
        grid = grid_of(outputs, inputs, bits=self.bits, width=self.width, group=None, zeros="none")
        return solve.on_grids.clipped_by_histogram(weight_OI, grid.width, self.bins)
