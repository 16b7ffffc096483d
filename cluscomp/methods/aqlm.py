"""AQLM: sub-vectors of a few inputs as sums of M centroids, chosen by the layer's output (arXiv 2401.06118)."""

from typing import TYPE_CHECKING

from pydantic import Field

from cluscomp import solve
from cluscomp.methods.along_inputs import InputCodebooks
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.codebook import CodebookWeight
    from cluscomp.solve.layer import Seen
    from cluscomp.solve.shapes import Shape


@settings
class Aqlm(InputCodebooks):
    """Add the centroids of M `codebooks` for every D neighbouring inputs of an output.

    The codebooks' shape is chosen as `InputCodebooks` says.

    The start is K-means (`iterations` rounds, sub-vectors weighted by the mean square of their inputs) of the weight,
    then of what is left, and so on. Then in each of `rounds` the codebooks are solved for the codes (`least_squares`
    steps of conjugate gradients) and the codes are searched for the codebooks, sub-vector after sub-vector with the
    `beam` best choices of its codes kept; the codebooks have the last word. `damping` is added to the diagonal of the
    second moment, as a share of its mean.

    Unlike the authors': codes in order and not at random; a beam within a sub-vector and not over an output's whole row
    (at 1, their default, both are coordinate descent); least squares in the place of Adam; no scale for each output.
    Their finetuning of blocks is the stage block_finetune.
    """

    codebooks: int = Field(ge=1, le=8)
    iterations: int = Field(ge=1)
    rounds: int = Field(ge=0)
    least_squares: int = Field(ge=1)
    beam: int = Field(ge=1, le=64)
    damping: float = Field(gt=0, le=1)

    @property
    def added(self) -> int:
        """M: as many as `codebooks` says."""
        return self.codebooks

    def stored(
        self, weight_OI: "Tensor", seen: "Seen", generator: "torch.Generator", shape: "Shape"
    ) -> "CodebookWeight":
        """Find codes and codebooks of a weight (O, I); see `InputCodebooks.stored`."""
        return solve.along_inputs.as_sum(
            weight_OI,
            solve.along_outputs.damped(seen.matrix_II, self.damping),
            shape,
            self.storage,
            generator,
            codebooks=self.codebooks,
            iterations=self.iterations,
            rounds=self.rounds,
            least_squares=self.least_squares,
            beam=self.beam,
        )
