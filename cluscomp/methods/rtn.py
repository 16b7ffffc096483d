"""RTN: every weight rounded to the nearest number of a uniform grid; the baseline all others must beat."""

from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.costs import Work
    from cluscomp.grids import Grid
    from cluscomp.moments import SecondMoment
    from cluscomp.uniform import UniformWeight


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class RoundToNearest:
    """Round to the nearest of 2^width values between the least and the largest weight of a group of inputs. No data.

    Either `bits` is given, the most bits per weight that may be stored, and width and groups are chosen for each matrix
    (`cluscomp.grids.grid_of` says which limits can be met); or `width`, and `group`, the most inputs that share a scale
    (null: all of an output). `symmetric`: no zero is stored, and the grid is the same on both sides of 0.
    """

    bits: float | None = Field(ge=1, le=8)
    width: int | None = Field(ge=1, le=8)
    group: int | None = Field(ge=1)
    symmetric: bool

    @model_validator(mode="after")
    def _either_bits_or_width(self) -> "RoundToNearest":
        from cluscomp.grids import check_choice

        check_choice(self.bits, width=self.width, group=self.group)
        return self

    @property
    def exact(self) -> bool:
        """Always: shapes alone decide."""
        return True

    def _grid(self, out_features: int, in_features: int) -> "Grid":
        from cluscomp.grids import grid_of

        return grid_of(
            out_features,
            in_features,
            bits=self.bits,
            width=self.width,
            group=self.group,
            zeros="none" if self.symmetric else "whole",
        )

    def check(self, out_features: int, in_features: int) -> None:
        """Whether some grid meets the limit; see `Method.check`."""
        self._grid(out_features, in_features)

    def outline(self, out_features: int, in_features: int) -> "UniformWeight":
        """The stored form; see `Method.outline`."""
        from cluscomp.grids import outline

        return outline(out_features, in_features, self._grid(out_features, in_features))

    def work(self, out_features: int, in_features: int) -> "Work":
        """A few passes over the weight; see `Method.work`."""
        from cluscomp.costs import Work

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
        from cluscomp.uniform import grids_for, rounded_weight

        grid = self._grid(*weight_OI.shape)
        scales_OG, zeros_OG = grids_for(weight_OI, grid.width, grid.groups, symmetric=grid.symmetric)
        return rounded_weight(weight_OI, scales_OG, zeros_OG, grid.width, symmetric=grid.symmetric)
