"""Weights as they are, in 16 bits: the factors of a low rank."""

from typing import Any

import torch
from jaxtyping import Float, Float16
from torch import Tensor, nn

from cluscomp.forms.stored import Extent, Single


class PlainWeight(Single):
    """A weight as numbers of 16 bits: `numbers` (O, I) float16, which can be trained."""

    kind = "plain"
    trained = "numbers"

    def __init__(self, numbers: Float16[Tensor, "O I"]) -> None:
        super().__init__()
        self.out_features, self.in_features = numbers.shape
        self.numbers = nn.Parameter(numbers)

    @classmethod
    def empty(cls, *, out_features: Extent, in_features: Extent) -> "PlainWeight":
        """A form of the given shape with undefined content, on the default device; to be loaded into."""
        return cls(torch.empty(out_features, in_features, dtype=torch.float16))

    @classmethod
    def bits(cls, *, out_features: int, in_features: int) -> dict[str, int]:
        """Stored bits: 16 a number."""
        return {"numbers": 16 * out_features * in_features}

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this form's shape again."""
        return {"out_features": self.out_features, "in_features": self.in_features}

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The weight (O, I) in `dtype`; `inputs` is all of them (see `tiles`)."""
        return self.numbers.to(dtype)
