"""Of what a limit of bits is the most: of each block, or of the whole model."""

from typing import Literal

from cluscomp.settings import settings


@settings
class Allocation:
    """What `bits` is the most of: of each "block" (or matrix, as the method says), or of the whole "model".

    Over the model the calibration text goes through the original once more, and every block's layers are measured; then
    the bits are shared out so that the damage of all is least. It is the method's own measure of damage, which compares
    layers by their relative errors, not by what the model's predictions lose.
    """

    scope: Literal["block", "model"]
