"""Weights of which some are zero, by a mask of one bit each."""

from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cluscomp.forms.stored import Combined, Extent, Stored, build, described
from cluscomp.kernels.codes import pack, packed_bytes, unpack


class Masked(Combined):
    """A weight as `inner` where the mask has a 1, and 0 elsewhere.

    Stored beside `inner`: `mask`, uint8, the bits of (O, I) packed (kernels/codes.py).
    """

    kind = "masked"
    mask: Tensor

    def __init__(self, inner: Stored, mask: UInt8[Tensor, " bytes"]) -> None:
        super().__init__()
        self.out_features, self.in_features = inner.out_features, inner.in_features
        self.inner = inner
        self.register_buffer("mask", mask)

    @classmethod
    def keeping(cls, inner: Stored, kept_OI: Bool[Tensor, "O I"]) -> "Masked":
        """`inner` (O, I) where `kept_OI` is true."""
        return cls(inner, pack(kept_OI.flatten().int(), 1))

    @classmethod
    def empty(cls, *, inner: dict[str, Any], out_features: Extent, in_features: Extent) -> "Masked":
        """A form over one of this spec, (O, I), with undefined content, on the default device; to be loaded into."""
        return cls(build(inner), torch.empty(packed_bytes(out_features * in_features, 1), dtype=torch.uint8))

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
        return self.inner(dtype) * kept_OI.to(dtype)  # type: ignore[no-any-return]
