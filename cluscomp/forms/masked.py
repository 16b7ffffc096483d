"""Weights of which some are zero: those that are not, packed together, and a mask of one bit for each."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cluscomp.forms.stored import Combined, Extent, Stored, build, described
from cluscomp.kernels.codes import pack, packed_bytes, unpack


class Masked(Combined):
    """A weight (O, I) that keeps as many inputs of each output: `inner` (O, K) where the mask has a 1, 0 elsewhere.

    Stored beside `inner`: `mask`, uint8, the bits of (O, I) packed (kernels/codes.py): where 2 of 4 neighbours are
    kept as much as the two bits of a kept weight's place.
    """

    kind = "masked"
    mask: Tensor

    def __init__(self, inner: Stored, mask: UInt8[Tensor, " bytes"], *, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = inner.out_features, in_features
        self.inner = inner
        self.register_buffer("mask", mask)

    @classmethod
    def keeping(cls, inner: Stored, kept_OI: Bool[Tensor, "O I"]) -> "Masked":
        """The columns of `inner` (O, K), in their order, where `kept_OI` is true: in K places of each output."""
        return cls(inner, pack(kept_OI.flatten().int(), 1), in_features=kept_OI.shape[1])

    @classmethod
    def empty(cls, *, inner: dict[str, Any], out_features: Extent, in_features: Extent) -> "Masked":
        """A form (O, I) over one of this spec with undefined content, on the default device; to be loaded into."""
        mask = torch.empty(packed_bytes(out_features * in_features, 1), dtype=torch.uint8)
        return cls(build(inner), mask, in_features=in_features)

    @classmethod
    def own_bits(cls, *, inner: dict[str, Any], out_features: int, in_features: int) -> dict[str, int]:  # noqa: ARG003
        """One bit a weight, and padding."""
        numbers = out_features * in_features
        return {"masks": numbers, "padding": packed_bytes(numbers, 1) * 8 - numbers}

    @property
    def parts(self) -> tuple[Stored]:
        """What the mask lies on."""
        return (self.inner,)

    def spec(self) -> dict[str, Any]:
        """Kind and shapes of what the mask lies on, and its own."""
        return {"inner": described(self.inner), "out_features": self.out_features, "in_features": self.in_features}

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`; `inputs` is all of them (see `tiles`)."""
        kept_OI = unpack(self.mask, 1, self.out_features * self.in_features).view(self.out_features, -1)
        places_OI = (kept_OI.cumsum(1) - 1).clamp(0, self.inner.in_features - 1)
        return self.inner(dtype).gather(1, places_OI) * kept_OI.to(dtype)  # type: ignore[no-any-return]


def places_of(kept_OI: Bool[Tensor, "O I"], kept: int) -> Int[Tensor, "O K"]:
    """The places (O, K) of what a mask (O, I) keeps, rising: `kept` of each output."""
    order_OI: Tensor = kept_OI.int().argsort(dim=1, descending=True, stable=True)
    return order_OI[:, :kept]
