"""GPTVQ: sub-vectors of a few inputs coded with error feedback (arXiv 2402.15319)."""

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
class Gptvq(InputCodebooks):
    """GPTQ with a vector of a codebook for D neighbouring inputs of an output in the place of a rounded number.

    The codebooks' shape is chosen as `InputCodebooks` says. The authors' `storage` is int8.

    The codebook is that of K-means (`iterations` rounds, sub-vectors weighted by the mean square of their inputs); the
    codes are chosen D inputs at a time, errors handed on to the inputs to come; then come `least_squares` steps of
    conjugate gradients towards the codebook of least output error. `damping` is added to the diagonal of the second
    moment, as a share of its mean.

    Unlike the authors': one codebook for the whole matrix and not for each 2048 weights or so, weights of whole
    sub-vectors in K-means, least squares in the place of Adam.
    """

    iterations: int = Field(ge=1)
    least_squares: int = Field(ge=0)
    damping: float = Field(gt=0, le=1)

    def stored(
        self, weight_OI: "Tensor", seen: "Seen", generator: "torch.Generator", shape: "Shape"
    ) -> "CodebookWeight":
        """Find codes and codebook of a weight (O, I); see `InputCodebooks.stored`."""
        return solve.along_inputs.with_feedback(
            weight_OI,
            solve.along_outputs.damped(seen.matrix_II, self.damping),
            shape,
            self.storage,
            generator,
            iterations=self.iterations,
            least_squares=self.least_squares,
        )
