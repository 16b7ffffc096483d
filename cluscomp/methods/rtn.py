"""RTN: every weight rounded to the nearest number of a uniform grid; the baseline all others must beat."""

from typing import TYPE_CHECKING

from cluscomp.methods.on_grids import WholeGrids
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.uniform import UniformWeight
    from cluscomp.solve.layer import Seen


@settings
class RoundToNearest(WholeGrids):
    """Round to the nearest of 2^width values between the least and the largest weight of a group of inputs. No data.

    `bits`, `width`, `group` and `symmetric` choose the grids, as `WholeGrids` says.
    """

    def sees(self) -> frozenset[str]:
        """Nothing: no text is read."""
        return frozenset()

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "UniformWeight":
        """Round a weight (O, I); see `EachLayer.stored`."""
        from cluscomp.forms.uniform import grids_for, rounded_weight

        grid = self.grid(*weight_OI.shape)
        scales_OG, zeros_OG = grids_for(weight_OI, grid.width, grid.groups, symmetric=grid.symmetric)
        return rounded_weight(weight_OI, scales_OG, zeros_OG, grid.width, symmetric=grid.symmetric)
