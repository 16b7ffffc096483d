"""AWQ: inputs that are large on calibration text get finer steps, by a scale of their own (arXiv 2306.00978)."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cluscomp import solve
from cluscomp.methods.on_grids import WholeGrids
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.uniform import UniformWeight
    from cluscomp.solve.layer import Seen


@settings
class Awq(WholeGrids):
    """Multiply each input's weights by s = (its mean size)^a, round to uniform grids, and divide by s again.

    `bits`, `width`, `group` and `symmetric` choose the grids, as `WholeGrids` says.

    a is the best of 0, 1/`steps`, 2/`steps`, ... below 1; then each group's grid is narrowed by 5 % as often as helps,
    `clip` - 1 times at most (0: not at all). The error that counts is that of the layer's output. Unlike the authors',
    which folds s into the norm before (so layers that share an input share s, and the error is their parent's), ours is
    each layer's own and stored with its weight in 16 bits an input: no architecture has to be known, and it counts.
    """

    scaled_inputs: ClassVar[bool] = True
    steps: int = Field(ge=1)
    clip: int = Field(ge=0, le=20)

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs, and their mean size."""
        return frozenset({"moment", "magnitude"})

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "UniformWeight":
        """Round a weight (O, I) with scaled inputs; see `EachLayer.stored`."""
        assert seen is not None  # sees() asks for it
        grid = self.grid(*weight_OI.shape)
        return solve.on_grids.with_scaled_inputs(
            weight_OI,
            seen.matrix_II,
            seen.magnitude_I,
            grid.width,
            grid.groups,
            symmetric=grid.symmetric,
            steps=self.steps,
            clip=self.clip,
        )
