"""GPTQ: rounding input by input, each error handed on to the inputs still to come (arXiv 2210.17323)."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cluscomp import solve
from cluscomp.methods.on_grids import WholeGrids
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.uniform import UniformWeight
    from cluscomp.solve.layer import Seen


@settings
class Gptq(WholeGrids):
    """Round to uniform grids, and correct the inputs still to come by what their second moment says of each error.

    `bits`, `width`, `group` and `symmetric` choose the grids, as `WholeGrids` says.

    `act_order`: inputs come in the order of falling mean square. `static_groups`: all grids are those of the weights as
    they were; else a group's grid is taken when its first input comes, from its weights as corrected by then (also by
    errors of the present batch of inputs, which the authors' code leaves out). With `act_order` groups must be static:
    others would have to be stored in another order. `damping` is added to the diagonal of the second moment, as a share
    of its mean. What the blocks before hand on is the stage's to say: the authors' is `cluster.prefix=compressed`.
    An input that no calibration token uses keeps its weights, rounded (the authors set them to 0).
    """

    act_order: bool
    static_groups: bool
    damping: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _static_if_in_another_order(self) -> "Gptq":
        if self.act_order and not self.static_groups:
            raise ValueError("method.act_order=true needs method.static_groups=true")
        return self

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs."""
        return frozenset({"moment"})

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "UniformWeight":
        """Round a weight (O, I) with error feedback; see `EachLayer.stored`."""
        assert seen is not None  # sees() asks for it
        grid = self.grid(*weight_OI.shape)
        return solve.on_grids.with_feedback(
            weight_OI,
            solve.along_outputs.damped(seen.matrix_II, self.damping),
            grid.width,
            grid.groups,
            symmetric=grid.symmetric,
            act_order=self.act_order,
            static_groups=self.static_groups,
        )
