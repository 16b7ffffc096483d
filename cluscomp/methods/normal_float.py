"""NormalFloat: every weight rounded to the nearest quantile of a normal distribution: QLoRA (arXiv 2305.14314)."""

from typing import TYPE_CHECKING

from pydantic import Field

from cluscomp.methods.on_grids import Grid, Groups, widest
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.normal_float import NormalFloatWeight
    from cluscomp.solve.layer import Seen

LEAST_WIDTH = 2


@settings
class NormalFloat(Groups):
    """Round to fixed levels, by the largest weight of each group of an output's inputs, whose scale takes 8 bits.

    `bits`, `width` and `group` choose them as `Groups` says; QLoRA's is 4 bits and groups of 64, 4.127 bits a weight.

    Unlike the authors': groups end with an output, and are as equal as can be; the 8 bits of a scale are even steps
    from the mean of all and no floats; weights are rounded by the scale as it is stored.
    """

    width: int | None = Field(ge=LEAST_WIDTH, le=8)

    def grid(self, out_features: int, in_features: int) -> Grid:
        """Width and groups for a weight (O, I). Raises ValueError as `widest`."""
        from cluscomp.forms.normal_float import NormalFloatWeight

        def sized(width: int, groups: int) -> Grid:
            parts = NormalFloatWeight.bits(
                out_features=out_features, in_features=in_features, width=width, groups=groups
            )
            return Grid(width, groups, "none", sum(parts.values()))

        return widest(
            out_features, in_features, sized, bits=self.bits, width=self.width, group=self.group, least=LEAST_WIDTH
        )

    def sees(self) -> frozenset[str]:
        """Nothing: no text is read."""
        return frozenset()

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "NormalFloatWeight":
        """Round a weight (O, I); see `EachLayer.stored`."""
        from cluscomp.forms.normal_float import NormalFloatWeight

        grid = self.grid(*weight_OI.shape)
        return NormalFloatWeight.nearest(weight_OI, grid.width, grid.groups)
