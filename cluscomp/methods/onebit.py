"""OneBit: the signs of a weight, with a value for each output and each input (arXiv 2402.11295)."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluscomp import solve
from cluscomp.methods.each_layer import EachLayer
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.signs import SignWeight
    from cluscomp.solve.layer import Seen


@settings
class OneBit(EachLayer):
    """Take a weight for diag(h) S diag(g): S its signs, 1 bit each, h and g values of 16 bits (OneBit's SVID).

    A weight (O, I) so stores 1 + 16 (O + I) / (O I) bits a weight, whatever they are; `bits`, if it is given, is a
    limit that this must meet. The values come of `rounds` of alternating least squares to |W|; with `weighting`
    "diagonal" a weight counts by the mean square of its input, with "none" (the authors') all alike (no data).

    With `post_norm` a layer normalises what it gives, to mean 0 and variance 1 without weights, as the authors' do. It
    stores nothing, but forgets how large outputs are, so the model is of no use until long training made up for it.

    Training is that of the stages: block_finetune=onebit_quick lets dense weights learn with their signs, and values;
    in recover values learn, by recover=onebit_quick from the original's predictions and hidden states.
    """

    bits: float | None = Field(ge=1, le=8)
    weighting: Literal["none", "diagonal"]
    rounds: int = Field(ge=1)
    post_norm: bool

    def sees(self) -> frozenset[str]:
        """The mean square of the inputs, if `weighting` asks for it."""
        return frozenset() if self.weighting == "none" else frozenset({"diagonal"})

    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "SignWeight":
        """Find the signs and values of a weight (O, I); see `EachLayer.stored`."""
        outputs, inputs = weight_OI.shape
        importance_I = weight_OI.new_ones(inputs) if seen is None else seen.diagonal_I
        found = solve.signs.sign_value(weight_OI, importance_I, self.rounds)
        found.post_norm = self.post_norm
        stored = sum(found.ledger().values()) / (outputs * inputs)
        if self.bits is not None and stored > self.bits:
            raise ValueError(
                f"bits={self.bits} is out of reach for a {outputs} x {inputs} matrix: its signs and values store "
                f"{stored:.3f}, no more and no less; give no bits"
            )
        return found
