"""Weights as whole numbers that are coded by their entropy, with a scale for each input: what WaterSIC stores."""

from typing import Any

import torch
from jaxtyping import Float, Float16, Int8, UInt8
from torch import Tensor, nn

from cluscomp.forms.codebook import TILE
from cluscomp.forms.stored import Extent, Single, in_16_bits
from cluscomp.kernels.entropy import Plan, read, write


class EntropyWeight(Single):
    """A weight as whole numbers z of one byte: scale of the input times z, times that of the output where there is one.

    `dependent`: the z are levels of a quantiser with eight states (kernels/dependent.py).

    Stored: `stream`, uint8, the numbers (I, O) by rANS with tables and levels (kernels/entropy.py); `scales` (I,)
    float16, which can be trained; and where `outputs` are given (O,) float16. The stream is decoded once, when it is
    first used, and the numbers are kept in memory: a byte each, beside the stream.
    """

    kind = "entropy"
    trained = "scales"
    stream: Tensor
    scales: nn.Parameter
    outputs: Tensor | None

    def __init__(
        self,
        stream: UInt8[Tensor, " bytes"],
        scales: Float16[Tensor, " I"],
        outputs: Float16[Tensor, " O"] | None = None,
        *,
        out_features: int,
        dependent: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dependent = out_features, len(scales), dependent
        self.register_buffer("stream", stream)
        self.scales = nn.Parameter(scales)
        self.register_buffer("outputs", outputs)
        self._decoded: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def from_numbers(
        cls,
        numbers_IO: Int8[Tensor, "I O"],
        scales_I: Float[Tensor, " I"],
        outputs_O: Float[Tensor, " O"] | None = None,
        plan: Plan | None = None,
    ) -> "EntropyWeight":
        """Code numbers (I, O), by their `plan` where it is known, and round scales to 16 bits.

        Raises ValueError for a scale that is not finite or does not fit.
        """
        outputs_O = None if outputs_O is None else in_16_bits(outputs_O)
        stream, dependent = write(numbers_IO, plan).to(scales_I.device), plan is not None and plan.dependent
        return cls(stream, in_16_bits(scales_I), outputs_O, out_features=numbers_IO.shape[1], dependent=dependent)

    @classmethod
    def empty(
        cls,
        *,
        out_features: Extent,
        in_features: Extent,
        stream_bytes: Extent,
        scaled_outputs: bool,
        dependent: bool = False,
    ) -> "EntropyWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into."""
        return cls(
            torch.empty(stream_bytes, dtype=torch.uint8),
            torch.empty(in_features, dtype=torch.float16),
            torch.empty(out_features, dtype=torch.float16) if scaled_outputs else None,
            out_features=out_features,
            dependent=dependent,
        )

    @classmethod
    def bits(
        cls,
        *,
        out_features: int,
        in_features: int,
        stream_bytes: int,
        scaled_outputs: bool,
        dependent: bool = False,  # noqa: ARG003
    ) -> dict[str, int]:
        """Stored bits: the stream, with the tables and levels it begins with, and scales."""
        return {"codes": 8 * stream_bytes, "scales": 16 * (in_features + (out_features if scaled_outputs else 0))}

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this module's shapes again."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "stream_bytes": len(self.stream),
            "scaled_outputs": self.outputs is not None,
        } | ({"dependent": True} if self.dependent else {})

    def numbers(self) -> Int8[Tensor, "I O"]:
        """The numbers (I, O) in int8. Raises ValueError if the stream is damaged."""
        if self.stream.is_meta:
            return self.stream.new_empty(self.in_features, self.out_features, dtype=torch.int8)
        known = self._decoded
        if known is None or known[0] is not self.stream or known[1] != self.stream._version:
            numbers_IO = read(self.stream, self.in_features, self.out_features, dependent=self.dependent).to(
                self.stream.device
            )
            self._decoded = known = self.stream, self.stream._version, numbers_IO
        return known[2]

    def forget(self) -> None:
        """Let go of the decoded numbers."""
        self._decoded = None

    def decoded_bytes(self) -> int:
        """A byte for each number."""
        return self.out_features * self.in_features

    def tiles(self) -> list[slice]:
        """Large weights are rebuilt in tiles of some 2^21 entries."""
        step = max(1, TILE // self.out_features)
        if self.in_features <= 4 * step:
            return [slice(0, self.in_features)]
        return [slice(i, min(i + step, self.in_features)) for i in range(0, self.in_features, step)]

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (O, I), or the columns of one of `tiles()`, in `dtype`, made in float32."""
        inputs = inputs or slice(None)
        dense_IO = self.numbers()[inputs] * self.scales[inputs].float()[:, None]
        return (dense_IO if self.outputs is None else dense_IO * self.outputs.float()).to(dtype).T

    def check(self) -> None:
        """Raise ValueError if a scale is not finite or the stream is none of these numbers (a damaged file)."""
        super().check()
        self.numbers()
