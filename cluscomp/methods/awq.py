"""AWQ: inputs that are large on calibration text get finer steps, by a scale of their own (arXiv 2306.00978)."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cluscomp.methods.on_grids import Grid, WholeGrids
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
        from cluscomp.forms.uniform import UniformWeight, grids_for, in_16_bits, nearest, spread
        from cluscomp.kernels.counting import alike
        from cluscomp.solve.along_outputs import output_error

        assert seen is not None  # sees() asks for it
        grid, inputs = self.grid(*weight_OI.shape), weight_OI.shape[1]
        moment_II, size_I = seen.matrix_II, seen.magnitude_I.clamp(min=1e-4)
        best = None
        for step in alike(range(self.steps), weight_OI):
            scale_I = size_I ** (step / self.steps)
            scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
            inverse_I = in_16_bits(1 / scale_I).float()
            scaled_OI = weight_OI / inverse_I
            scales_OG, zeros_OG = grids_for(scaled_OI, grid.width, grid.groups, symmetric=grid.symmetric)
            error_OI = self._error(scaled_OI, spread(scales_OG, inputs), spread(zeros_OG, inputs), grid.width)
            error = output_error(error_OI * inverse_I, moment_II)
            if best is None or error < best[0]:
                best = error, inverse_I, scales_OG, zeros_OG
        assert best is not None  # steps >= 1
        _, inverse_I, scales_OG, zeros_OG = best
        scaled_OI = weight_OI / inverse_I
        if self.clip:
            scaled_II = moment_II * inverse_I * inverse_I[:, None]
            scales_OG, zeros_OG = self._clipped(scaled_OI, scaled_II, grid)
        codes_OI = nearest(scaled_OI, spread(scales_OG, inputs), spread(zeros_OG, inputs), grid.width)
        zeros = None if grid.symmetric else zeros_OG.int()
        return UniformWeight.from_codes(codes_OI, scales_OG, zeros, grid.width, inverse_I)

    def _clipped(self, weight_OI: "Tensor", moment_II: "Tensor", grid: Grid) -> "tuple[Tensor, Tensor]":
        """Scales and zeros (O, G) of each group (O, C) narrowed as its part of the output's error likes best."""
        import torch

        from cluscomp.forms.uniform import bounds, grid_for
        from cluscomp.kernels.counting import alike

        scales, zeros = [], []
        for group in alike(bounds(weight_OI.shape[1], grid.groups), weight_OI):
            weight_OC, moment_CC = weight_OI[:, group], moment_II[group, group]
            least_O = torch.full_like(weight_OC[:, 0], torch.inf)
            best_O, best_zero_O = torch.zeros_like(least_O), torch.zeros_like(least_O)
            for narrower in alike(range(self.clip), weight_OI):
                shrink = 1 - 0.05 * narrower
                scale_O, zero_O = grid_for(weight_OC, grid.width, symmetric=grid.symmetric, shrink=shrink)
                error_OC = self._error(weight_OC, scale_O[:, None], zero_O[:, None], grid.width)
                error_O = ((error_OC @ moment_CC) * error_OC).sum(1)
                better_O = error_O < least_O
                best_O, best_zero_O = torch.where(better_O, scale_O, best_O), torch.where(better_O, zero_O, best_zero_O)
                least_O = torch.minimum(error_O, least_O)
            scales.append(best_O)
            zeros.append(best_zero_O)
        of_all = (-1, grid.groups)  # where one stands for all
        return torch.stack(scales, 1).expand(of_all), torch.stack(zeros, 1).expand(of_all)

    def _error(self, weight: "Tensor", scale: "Tensor", zero: "Tensor", width: int) -> "Tensor":
        """Values of the grid less the weights they stand for; all of one shape, or spread to it."""
        from cluscomp.forms.uniform import nearest

        return (nearest(weight, scale, zero, width) - zero) * scale - weight
