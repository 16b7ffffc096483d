"""RTN: every weight rounded to the nearest number of a uniform grid; the baseline all others must beat."""

from typing import TYPE_CHECKING

from cluscomp.methods.on_grids import WholeGrids
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.uniform import UniformWeight
    from cluscomp.kernels.work import Work
    from cluscomp.solve.layer import SecondMoment


@settings
class RoundToNearest(WholeGrids):
    """Round to the nearest of 2^width values between the least and the largest weight of a group of inputs. No data.

    `bits`, `width`, `group` and `symmetric` choose the grids, as `WholeGrids` says.
    """

    def work(self, out_features: int, in_features: int) -> "Work":
        """A few passes over the weight; see `Method.work`."""
        from cluscomp.kernels.work import Work

        return Work(traffic=60.0 * out_features * in_features)

    def scratch(self, out_features: int, in_features: int) -> float:
        """Scales and zeros spread over the weight, and its numbers before they are packed; see `Method.scratch`."""
        return 24.0 * out_features * in_features

    def statistic(self) -> None:
        """None: no data is looked at."""
        return

    def compress(
        self,
        weight_OI: "Tensor",
        statistic: "SecondMoment | None",  # noqa: ARG002
        generator: "torch.Generator",  # noqa: ARG002
    ) -> "UniformWeight":
        """Round a weight (O, I); see `Method.compress`."""
        from cluscomp.forms.uniform import grids_for, rounded_weight

        grid = self.grid(*weight_OI.shape)
        scales_OG, zeros_OG = grids_for(weight_OI, grid.width, grid.groups, symmetric=grid.symmetric)
        return rounded_weight(weight_OI, scales_OG, zeros_OG, grid.width, symmetric=grid.symmetric)
