"""HQQ: the zeros of uniform grids by half-quadratic splitting, without data (Badri and Shaji, 2023)."""

from typing import TYPE_CHECKING

from pydantic import Field

from cluscomp.methods.on_grids import Grids
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.uniform import UniformWeight, Zeros
    from cluscomp.solve.layer import Seen


@settings
class Hqq(Grids):
    """Round to uniform grids whose zeros, any 16-bit numbers, are fitted to the sum of |error|^`norm` over the weights.

    `bits`, `width` and `group` choose the grids, as `Grids` says. Scales span from the least to the
    largest weight and stay; of 1 bit the two values begin at the mean, less and plus the mean distance from it (the
    authors': at the extremes).

    Each of at most `iterations` splits the error into a sparse part, what the norm's proximal operator leaves of it
    (its weight `beta` grows by the factor `kappa`), and one that the zeros take up. The zeros of least mean |error| are
    kept, and all ends once it falls no more.
    """

    norm: float = Field(gt=0, le=1)
    beta: float = Field(gt=0)
    kappa: float = Field(ge=1)
    iterations: int = Field(ge=0)

    @property
    def zeros(self) -> "Zeros":
        """Any numbers of 16 bits."""
        return "float16"

    def sees(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "UniformWeight":
        """Fit zeros to a weight (O, I) and round it; see `EachLayer.stored`."""
        import torch

        from cluscomp.forms.uniform import UniformWeight, divisor, in_16_bits, nearest, of_groups, spread
        from cluscomp.kernels.counting import alike

        grid, inputs = self.grid(*weight_OI.shape), weight_OI.shape[1]

        def mean(part_OGC: "Tensor") -> "Tensor":
            return part_OGC.mean(2)

        low_OG = of_groups(weight_OI, grid.groups, lambda part_OGC: part_OGC.amin(2))
        high_OG = of_groups(weight_OI, grid.groups, lambda part_OGC: part_OGC.amax(2))
        if grid.width == 1:
            mean_OG = of_groups(weight_OI, grid.groups, mean)
            away_OI = (weight_OI - spread(mean_OG, inputs)).abs()
            away_OG = of_groups(away_OI, grid.groups, mean)
            low_OG, high_OG = mean_OG - away_OG, mean_OG + away_OG
        flat_OG = low_OG == high_OG  # one number, or all the same: from it to 0
        low_OG = torch.where(flat_OG, low_OG.clamp(max=0), low_OG)
        high_OG = torch.where(flat_OG, high_OG.clamp(min=0), high_OG)
        scales_OG = in_16_bits((high_OG - low_OG) / (2**grid.width - 1)).float()
        zeros_OG = in_16_bits(-low_OG / divisor(scales_OG)).float()
        scale_OI = spread(divisor(scales_OG), inputs)
        steps_OI = weight_OI / scale_OI  # what follows is in steps of the grids
        best, least, beta = zeros_OG, torch.tensor(torch.inf, device=weight_OI.device), self.beta
        for turn in alike(range(self.iterations + 1), weight_OI):
            zero_OI = spread(zeros_OG, inputs)
            codes_OI = (steps_OI + zero_OI).round_().clamp_(0, 2**grid.width - 1)
            error_OI = (steps_OI + zero_OI).sub_(codes_OI).mul_(scale_OI)
            size_OI = error_OI.abs()
            now = size_OI.mean()
            if not bool(now < least):
                break
            best, least = zeros_OG, now
            if turn < self.iterations:
                shrunk_OI = size_OI.sub_(size_OI.pow(self.norm - 1).div_(beta)).clamp_(min=0)
                sparse_OI = shrunk_OI.copysign_(error_OI).div_(scale_OI)
                wanted_OI = codes_OI.sub_(steps_OI).add_(sparse_OI)
                zeros_OG = in_16_bits(of_groups(wanted_OI, grid.groups, mean)).float()
                beta *= self.kappa
        codes_OI = nearest(weight_OI, scale_OI, spread(best, inputs), grid.width)
        return UniformWeight.from_codes(codes_OI, scales_OG, best, grid.width)
