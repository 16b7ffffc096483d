"""QTIP: rotated weights as paths through a trellis, coded with error feedback (arXiv 2406.11235)."""

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

MOST_WIDTH = 8


@settings
class Qtip(EachLayer):
    """Turn the weight on both sides by random signs and a Hadamard transform, and store paths through a trellis.

    Either `bits` is given, the most bits per weight that may be stored, scales, seed and padding of tiles included; or
    `width`, the bits of a number (k), by hand. A path of k bits a number and a scale would store 2.0002 bits at k = 2:
    so as many tiles, from the first inputs on, have k - 1 bits a number as the limit asks for. At bits=2 of a 576 x 576
    matrix that is one tile of 1296; limits between whole numbers are met in the same way.

    `state_bits` (L): bits of a state; a pass through the trellis takes time with 2^L (the authors': 16). `code`: the
    number a state stands for, the paper's "1mad" or "3inst", computed and not stored. A path is a tile of
    `tile_outputs` times `tile_inputs` numbers (the authors': 16 and 16), chosen together; errors are handed on to the
    inputs after the tile, so tiles of few inputs make better use of them. `scales`: one for the "matrix", or for each
    "output", 16 bits each. `damping` is added to the diagonal of the second moment, as a share of its mean.

    Unlike the authors': finetuning is a stage of its own, in which the scales learn (theirs learns the weights not yet
    coded, norms and the sign vectors); odd factors of a size have Hartley's transform; the scale is that of least
    output error.
    """

    bits: float | None = Field(ge=1, le=8)
    width: int | None = Field(ge=1, le=MOST_WIDTH)
    state_bits: int = Field(ge=9, le=16)
    code: Literal["1mad", "3inst"]
    tile_outputs: int = Field(ge=1, le=4096)
    tile_inputs: int = Field(ge=1, le=64)
    scales: Literal["matrix", "output"]
    damping: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _fit_together(self) -> "Qtip":
        check_choice(self.bits, width=self.width)
        length = self.tile_outputs * self.tile_inputs
        if length % 8 or length < 16:
            raise ValueError(
                f"method.tile_outputs times method.tile_inputs must be a multiple of 8, at least 16 (here {length})"
            )
        return self

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs."""
        return frozenset({"moment"})

    def widths(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Bits of a number (k), and the tiles that have k - 1, for a weight (O, I): by hand, or the most within `bits`.

        Raises ValueError if nothing fits.
        """
        from cluscomp.forms.trellis import tile_count

        return solve.widths.chosen(
            self.bits,
            self.width,
            (out_features, in_features),
            parts=tile_count(out_features, in_features, self.tile_outputs, self.tile_inputs),
            length=self.tile_outputs * self.tile_inputs,
            scaled_outputs=self.scales == "output",
            most=MOST_WIDTH,
        )

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "Rotated":
        """Find the paths of a weight (O, I); see `EachLayer.stored`."""
        assert seen is not None  # sees() asks for it
        width, narrow = self.widths(*weight_OI.shape)
        start = solve.turned.start(weight_OI, seen.matrix_II, self.damping, generator)
        found = solve.trellis.with_feedback(
            start.weight_OI,
            start.moment_II,
            tile_outputs=self.tile_outputs,
            tile_inputs=self.tile_inputs,
            state_bits=self.state_bits,
            width=width,
            narrow=narrow,
            code=self.code,
            scaled_outputs=self.scales == "output",
        )
        return start.stored(found)
