"""SqueezeLLM: each weight one of a few values that are free for every output (arXiv 2306.07629), the dense part."""

from typing import TYPE_CHECKING, Literal

from cluscomp.methods.on_grids import Grid, Groups, widest
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.table import TableWeight
    from cluscomp.solve.layer import Seen


@settings
class SqueezeLlm(Groups):
    """K-means of single numbers, solved exactly, with a table of 2^width values for each group of an output's inputs.

    A table takes 16 bits a value, and counts: `bits`, `width` and `group` choose it as `Groups` says.
    With `weighting` "diagonal" a weight counts by the mean square of its input, "none" all alike (no data).

    Unlike the authors': they weight by the squared gradient of the model's loss, not by the input, which needs a
    backward pass through the whole model; and they keep outliers apart in a sparse matrix, which is not done here.
    """

    weighting: Literal["none", "diagonal"]

    def grid(self, out_features: int, in_features: int) -> Grid:
        """Width and groups for a weight (O, I). Raises ValueError as `widest`."""
        from cluscomp.forms.table import TableWeight

        def sized(width: int, groups: int) -> Grid:
            parts = TableWeight.bits(out_features=out_features, in_features=in_features, width=width, groups=groups)
            return Grid(width, groups, "none", sum(parts.values()))

        return widest(out_features, in_features, sized, bits=self.bits, width=self.width, group=self.group)

    def sees(self) -> frozenset[str]:
        """The mean square of the inputs, if `weighting` asks for it."""
        return frozenset() if self.weighting == "none" else frozenset({"diagonal"})

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "TableWeight":
        """Find the tables of a weight (O, I); see `EachLayer.stored`."""
        from cluscomp.forms.table import TableWeight, tables_for

        grid = self.grid(*weight_OI.shape)
        importance_I = weight_OI.new_ones(weight_OI.shape[1]) if seen is None else seen.diagonal_I
        return TableWeight.nearest(weight_OI, tables_for(weight_OI, importance_I, grid.width, grid.groups))
