"""QuIP#: rotated weights as vectors of a table cut from the E8 lattice, with error feedback (arXiv 2402.04396)."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cluscomp import solve
from cluscomp.methods.each_layer import EachLayer
from cluscomp.methods.on_grids import check_choice
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.rotated import Rotated
    from cluscomp.solve.layer import Seen

MOST_WIDTH = 4


@settings
class QuipSharp(EachLayer):
    """Turn the weight on both sides by random signs and a Hadamard transform, and store codes of E8P for 8 inputs each.

    Either `bits` is given, the most bits per weight that may be stored (more than 4 are not spent), scales and seed
    included; or `width`, the bits of a number, by hand: 1 to 4, of which 2 are E8P alone, 3 and 4 with a second code
    for what is left, 1 the second table of 3 bits alone (see `forms.lattice`). Codes and a scale would store 2.0002
    bits at 2: so as many vectors, of the first inputs, have a bit a number less as the limit asks for, a dozen at
    bits=2. Limits between whole numbers are met in the same way.

    `scales`: one for the "matrix", or for each "output", 16 bits each. `damping` is added to the diagonal of the second
    moment, as a share of its mean.

    Unlike the authors': no finetuning here (a stage of its own); odd factors of a size have Hartley's transform; a
    vector is the best for the output and not the nearest; the scale is that of least output error; 29 rows of the table
    and 15 vectors of the second one are others of the same size, and the factors of tables are measured anew.
    """

    bits: float | None = Field(ge=1, le=8)
    width: int | None = Field(ge=1, le=MOST_WIDTH)
    scales: Literal["matrix", "output"]
    damping: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _either_bits_or_width(self) -> "QuipSharp":
        check_choice(self.bits, width=self.width)
        return self

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs."""
        return frozenset({"moment"})

    def widths(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Bits of a number, and the vectors that have one less, for a weight (O, I): by hand, or the most in `bits`.

        Raises ValueError if nothing fits.
        """
        from cluscomp.forms.lattice import DIM, vector_count

        return solve.widths.chosen(
            self.bits,
            self.width,
            (out_features, in_features),
            parts=vector_count(out_features, in_features),
            length=DIM,
            scaled_outputs=self.scales == "output",
            most=MOST_WIDTH,
        )

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "Rotated":
        """Find the codes of a weight (O, I); see `EachLayer.stored`."""
        assert seen is not None  # sees() asks for it
        width, narrow = self.widths(*weight_OI.shape)
        start = solve.turned.start(weight_OI, seen.matrix_II, self.damping, generator)
        found = solve.lattice.with_feedback(
            start.weight_OI, start.moment_II, width=width, narrow=narrow, scaled_outputs=self.scales == "output"
        )
        return start.stored(found)
