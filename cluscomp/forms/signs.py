"""Weights as signs with scales of outputs, of inputs or of both: the factors of a low-rank binary weight."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cluscomp.forms.stored import Extent, Single, in_16_bits
from cluscomp.kernels.codes import pack, packed_bytes, unpack


class SignWeight(Single):
    """A weight as diag(h) S diag(g), S being -1 and 1: OneBit's form (arXiv 2402.11295), with its norm or without.

    Stored: `codes`, uint8, the signs (O, I) packed, 1 for a positive one (kernels/codes.py); and `scales` float16,
    those of outputs, h (O,), then those of inputs, g (I,), of which one may be missing. Scales can be trained. The norm
    of what its layer gives has no weights, so nothing is stored of it.
    """

    kind = "signs"
    trained = "scales"
    learns = frozenset({"values", "weights"})
    codes: Tensor
    scales: nn.Parameter

    def __init__(
        self,
        codes: UInt8[Tensor, " bytes"],
        scales: Float[Tensor, " S"],
        *,
        out_features: int,
        in_features: int,
        scaled_outputs: bool,
        scaled_inputs: bool,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.scaled_outputs, self.scaled_inputs, self.post_norm = scaled_outputs, scaled_inputs, post_norm
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(scales, requires_grad=scales.is_floating_point())

    @classmethod
    def from_signs(
        cls,
        signs_OI: Float[Tensor, "O I"],
        outputs_O: Float[Tensor, " O"] | None,
        inputs_I: Float[Tensor, " I"] | None,
        post_norm: bool = False,
    ) -> "SignWeight":
        """Build from numbers (O, I), of which the signs are kept, and scales (O,) and (I,), rounded to 16 bits.

        Raises ValueError if a scale does not fit, or there are none.
        """
        scales = [given for given in (outputs_O, inputs_I) if given is not None]
        if not scales:
            raise ValueError("signs without a scale")
        return cls(
            pack((signs_OI > 0).flatten().int(), 1),
            in_16_bits(torch.cat(scales)),
            out_features=signs_OI.shape[0],
            in_features=signs_OI.shape[1],
            scaled_outputs=outputs_O is not None,
            scaled_inputs=inputs_I is not None,
            post_norm=post_norm,
        )

    @classmethod
    def empty(
        cls,
        *,
        out_features: Extent,
        in_features: Extent,
        scaled_outputs: bool,
        scaled_inputs: bool,
        post_norm: bool = False,
    ) -> "SignWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into.

        Raises ValueError if there is no scale.
        """
        scales = _scale_count(out_features, in_features, scaled_outputs, scaled_inputs)
        if not scales:
            raise ValueError("signs without a scale")
        return cls(
            torch.empty(packed_bytes(out_features * in_features, 1), dtype=torch.uint8),
            torch.empty(scales, dtype=torch.float16),
            out_features=out_features,
            in_features=in_features,
            scaled_outputs=scaled_outputs,
            scaled_inputs=scaled_inputs,
            post_norm=post_norm,
        )

    @classmethod
    def bits(
        cls,
        *,
        out_features: int,
        in_features: int,
        scaled_outputs: bool,
        scaled_inputs: bool,
        post_norm: bool = False,  # noqa: ARG003  # it has no weights
    ) -> dict[str, int]:
        """Stored bits: codes, scales, padding of the packed signs."""
        numbers = out_features * in_features
        return {
            "codes": numbers,
            "scales": 16 * _scale_count(out_features, in_features, scaled_outputs, scaled_inputs),
            "padding": packed_bytes(numbers, 1) * 8 - numbers,
        }

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this module's shapes again."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "scaled_outputs": self.scaled_outputs,
            "scaled_inputs": self.scaled_inputs,
        } | ({"post_norm": True} if self.post_norm else {})

    def signs(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The signs (O, I), -1 and 1, in `dtype`."""
        codes_OI = unpack(self.codes, 1, self.out_features * self.in_features).view(self.out_features, -1)
        return codes_OI.to(dtype).mul_(2).sub_(1)

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, made in float32; `inputs` is all of them (see `tiles`)."""
        return self.scaled(self.signs(torch.float32), self.scales.float()).to(dtype)

    def scaled(self, signs_OI: Float[Tensor, "O I"], scales_S: Float[Tensor, " S"]) -> Float[Tensor, "O I"]:
        """Signs (O, I) times scales (S,), which are in the order that they are stored in."""
        outputs_O, inputs_I = self.split(scales_S)
        dense_OI = signs_OI if outputs_O is None else signs_OI * outputs_O[:, None]
        return dense_OI if inputs_I is None else dense_OI * inputs_I

    def split(self, scales_S: Float[Tensor, " S"]) -> tuple[Float[Tensor, " O"] | None, Float[Tensor, " I"] | None]:
        """Of such scales (S,) those of outputs (O,) and of inputs (I,), where there are any."""
        outputs_O = scales_S[: self.out_features] if self.scaled_outputs else None
        return outputs_O, scales_S[-self.in_features :] if self.scaled_inputs else None


def _scale_count(out_features: int, in_features: int, scaled_outputs: bool, scaled_inputs: bool) -> int:
    return out_features * scaled_outputs + in_features * scaled_inputs
