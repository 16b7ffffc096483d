"""GPTQ: rounding input by input, each error handed on to the inputs still to come (arXiv 2210.17323)."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cluscomp.methods.on_grids import WholeGrids
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.uniform import UniformWeight
    from cluscomp.solve.along_outputs import Wanted
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
        import torch

        from cluscomp.forms.uniform import UniformWeight, bounds, grid_for, grids_for, nearest
        from cluscomp.kernels.counting import numbers
        from cluscomp.solve.along_outputs import damped, feedback

        assert seen is not None  # sees() asks for it
        grid, inputs = self.grid(*weight_OI.shape), weight_OI.shape[1]
        moment_II = damped(seen.matrix_II, self.damping)
        scales_OG, zeros_OG = grids_for(weight_OI, grid.width, grid.groups, symmetric=grid.symmetric)
        groups = bounds(inputs, grid.groups)
        group_of = [number for number, group in enumerate(groups) for _ in range(group.start, group.stop)]
        order_I = torch.arange(inputs, device=weight_OI.device)
        if self.act_order:
            order_I = moment_II.diagonal().argsort(descending=True, stable=True)
        order = numbers(order_I)
        codes_IO = torch.empty(inputs, len(weight_OI), dtype=torch.int32, device=weight_OI.device)

        def choose(i: int, wanted: "Wanted", _factor: "Tensor") -> "Tensor":
            column, number = order[i], group_of[order[i]]
            if not self.static_groups and column == groups[number].start:
                scales_OG[:, number], zeros_OG[:, number] = grid_for(
                    wanted(groups[number].stop).T, grid.width, symmetric=grid.symmetric
                )
            scale_O, zero_O = scales_OG[:, number], zeros_OG[:, number]
            codes_IO[column] = codes_O = nearest(wanted(i + 1)[0], scale_O, zero_O, grid.width)
            return ((codes_O - zero_O) * scale_O)[None]

        feedback(weight_OI.T[order_I].contiguous(), moment_II[order_I][:, order_I], choose)
        return UniformWeight.from_codes(
            codes_IO.T.contiguous(), scales_OG, None if grid.symmetric else zeros_OG.int(), grid.width
        )
