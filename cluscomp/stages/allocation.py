"""Of what a limit of bits is the most: of each block, or of the whole model; and by which rule they are shared out."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluscomp import solve
from cluscomp.settings import settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluscomp.solve.allocate import Menu, Option


@settings
class Allocation:
    """What `bits` is the most of: of each "block" (or matrix, as the method says), or of the whole "model".

    Over the model the calibration text goes through the original once more, and every block's layers are measured; then
    the bits are shared out so that the damage of all is least. It is the method's own measure of damage, which compares
    layers by their relative errors, not by what the model's predictions lose.
    """

    scope: Literal["block", "model"]

    def share_out(self, menus: "Sequence[Menu]", bits: float) -> "list[Option]":
        """An option of each menu, within `bits` a weight of all together; see `solve.allocate.share_out`."""
        return solve.allocate.share_out(menus, bits)


@settings
class ByFormula(Allocation):
    """Over the whole model, by a formula for how damage falls with bits in the place of a choice by the menus alone.

    "opq": a quarter for each bit, from the damage at `bits` (OPQ); "marginal": an exponential fitted to each menu, and
    equal worth of the next bit (Collaborative Compression). See solve/curves.py.
    """

    scope: Literal["model"]
    formula: Literal["opq", "marginal"]

    def share_out(self, menus: "Sequence[Menu]", bits: float) -> "list[Option]":
        """As `Allocation.share_out`, never with more damage than if every menu had its first option."""
        return solve.allocate.share_out_by_curves(menus, bits, self.formula)


@settings
class ByGates(Allocation):
    """Over the whole model, by what bits are worth to what each block gives, learned on the calibration text.

    Single-path Bit Sharing: `levels` choices of each layer are nested, and a gate on each step between two pays for its
    bits. In `steps` steps, a batch each, gates learn by distillation of the original's block, and close as the price of
    a bit rises; what each was worth says how bits are shared out, for any limit (solve/gates.py). With
    `cluster.price=loss` a block's error counts by what it costs the predictions.
    """

    scope: Literal["model"]
    levels: int = Field(ge=2)
    steps: int = Field(ge=1)
