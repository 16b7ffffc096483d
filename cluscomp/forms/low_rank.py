"""Weights of low rank: the product of two thin matrices, each stored in a form of its own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.forms.stored import Combined, Stored, build, described


class LowRank(Combined):
    """A weight as `left` (O, R) times `right` (R, I); in 16 bits where these are `PlainWeight`s."""

    kind = "low_rank"

    def __init__(self, left: Stored, right: Stored) -> None:
        """Raises ValueError if the factors have two ranks."""
        super().__init__()
        if left.in_features != right.out_features:
            raise ValueError(f"factors of rank {left.in_features} and {right.out_features}")
        self.out_features, self.in_features = left.out_features, right.in_features
        self.left, self.right = left, right

    @classmethod
    def empty(cls, *, left: dict[str, Any], right: dict[str, Any]) -> "LowRank":
        """A form of two factors of these specs with undefined content, on the default device; to be loaded into."""
        return cls(build(left), build(right))

    @property
    def parts(self) -> tuple[Stored, Stored]:
        """The left and the right factor."""
        return self.left, self.right

    def spec(self) -> dict[str, Any]:
        """Kinds and shapes of both factors."""
        return {"left": described(self.left), "right": described(self.right)}

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, multiplied in float32; `inputs` is all of them (see `tiles`)."""
        dense_OI: Tensor = self.left(torch.float32) @ self.right(torch.float32)
        return dense_OI.to(dtype)

    def product(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """x W^T by way of the R numbers between the factors: (..., I) -> (..., O)."""
        product: Tensor = x @ self.right(x.dtype).T @ self.left(x.dtype).T
        return product
