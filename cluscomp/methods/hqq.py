"""HQQ: the zeros of uniform grids by half-quadratic splitting, without data (Badri and Shaji, 2023)."""

from typing import TYPE_CHECKING

from pydantic import Field

from cluscomp import solve
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
        """Nothing: no text is read."""
        return frozenset()

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "UniformWeight":
        """Fit zeros to a weight (O, I) and round it; see `EachLayer.stored`."""
        grid = self.grid(*weight_OI.shape)
        return solve.on_grids.with_fitted_zeros(
            weight_OI,
            grid.width,
            grid.groups,
            norm=self.norm,
            beta=self.beta,
            kappa=self.kappa,
            iterations=self.iterations,
        )
