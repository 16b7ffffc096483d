"""Weights as all their directions with a score each: what can be cut to any size (ACIP, arXiv 2502.01717)."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.stored import Stored, build, in_16_bits


class Ranked(LowRank):
    """A weight as `left` (O, R) times `right` (R, I), and `scores` (R,) float32: the lowest are to go first.

    R is min(O, I), so it takes more than the dense weight; `cut` makes of it what is worth storing.
    """

    kind = "ranked"
    scores: Tensor

    def __init__(self, left: Stored, right: Stored, scores: Float[Tensor, " R"]) -> None:
        """Raises ValueError if the factors have two ranks."""
        super().__init__(left, right)
        self.register_buffer("scores", scores)

    @classmethod
    def empty(cls, *, left: dict[str, Any], right: dict[str, Any]) -> "Ranked":
        """A form of two factors of these specs with undefined content, on the default device; to be loaded into."""
        factors = build(left), build(right)
        return cls(*factors, torch.empty(factors[1].out_features, dtype=torch.float32))

    @classmethod
    def own_bits(cls, *args: Any, **spec: Any) -> dict[str, int]:  # noqa: ARG003
        """32 bits a score."""
        with torch.device("meta"):
            return {"scores": 32 * build(spec["right"]).out_features}

    def check(self) -> None:
        """Raise ValueError if a factor or the scores are damaged."""
        Stored.check(self)

    def cut(self, kept_R: Bool[Tensor, " R"]) -> Stored:
        """The weight of some of its directions (R,) in 16 bits: as two factors, or dense where that takes no more.

        Raises ValueError for numbers that do not fit 16 bits.
        """
        left_OK, right_KI = self.left(torch.float32)[:, kept_R], self.right(torch.float32)[kept_R]
        if right_KI.shape[0] * (self.out_features + self.in_features) >= self.out_features * self.in_features:
            return PlainWeight(in_16_bits(left_OK @ right_KI))
        return LowRank(PlainWeight(in_16_bits(left_OK)), PlainWeight(in_16_bits(right_KI)))
