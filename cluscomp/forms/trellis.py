"""Weights as paths through a trellis whose states are numbers: what QTIP (arXiv 2406.11235) stores."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from cluscomp.forms.stored import Extent, Single, in_16_bits
from cluscomp.kernels.trellis import MOST_STATE_BITS, Code, code_values, pack_paths, path_bytes, path_numbers

MOST_WIDTH = 8


class TrellisWeight(Single):
    """A weight in tiles of some outputs and inputs, each a tail-biting path of k bits a number (kernels/trellis.py).

    Stored: `codes`, uint8, the paths' bits, and `scales` float16: one of the whole weight, (1,), or of each output,
    (O,). What a state stands for is computed (`code`), so there is no codebook. Tiles are numbered output by output,
    then input by input, and hold the numbers of their first input first. The first `narrow` of them have k - 1 bits a
    number in the place of k; of 0 bits, all numbers are 0. Tiles may reach beyond the weight: all their bits count as
    codes. Scales can be trained.
    """

    kind = "trellis"
    trained = "scales"
    codes: Tensor
    scales: nn.Parameter

    def __init__(
        self,
        codes: UInt8[Tensor, " bytes"],
        scales: Float[Tensor, " S"],
        *,
        out_features: int,
        in_features: int,
        tile_outputs: int,
        tile_inputs: int,
        state_bits: int,
        width: int,
        narrow: int,
        code: Code,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.tile_outputs, self.tile_inputs = tile_outputs, tile_inputs
        self.state_bits, self.width, self.narrow, self.code = state_bits, width, narrow, code
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(scales, requires_grad=scales.is_floating_point())

    @classmethod
    def from_states(
        cls,
        narrow_NT: Int[Tensor, "N T"] | None,
        wide_ST: Int[Tensor, "S T"] | None,
        scales_C: Float[Tensor, " C"],
        **spec: Any,
    ) -> "TrellisWeight":
        """Build from the states of the narrow tiles' paths (N, T) and of the others' (S, T), in their order.

        None where there are none, or those have no bits. Scales, (1,) or (O,), are rounded to 16 bits. Raises
        ValueError if one does not fit. `spec` is that of `empty`, without `scaled_outputs`.
        """
        width, state_bits = spec["width"], spec["state_bits"]
        parts = [(states, bits) for states, bits in ((narrow_NT, width - 1), (wide_ST, width)) if states is not None]
        packed = [pack_paths(states, state_bits, bits).flatten() for states, bits in parts]
        return cls(torch.cat(packed), in_16_bits(scales_C), **spec)

    @classmethod
    def empty(
        cls,
        *,
        out_features: Extent,
        in_features: Extent,
        tile_outputs: Extent,
        tile_inputs: Extent,
        state_bits: Extent,
        width: Extent,
        narrow: int,
        code: Code,
        scaled_outputs: bool,
    ) -> "TrellisWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into.

        Raises ValueError for sizes that cannot be.
        """
        tiles = tile_count(out_features, in_features, tile_outputs, tile_inputs)
        length = tile_outputs * tile_inputs
        if not (
            width <= MOST_WIDTH and width < state_bits <= MOST_STATE_BITS and state_bits <= max(width - 1, 1) * length
        ):
            raise ValueError(f"states of {state_bits} bits for steps of {width} bits and {length} numbers a tile")
        if not 0 <= narrow <= tiles or length < 16:
            raise ValueError(f"{narrow} narrow tiles of {tiles}, of {length} numbers")
        size = narrow * path_bytes(length, width - 1) + (tiles - narrow) * path_bytes(length, width)
        return cls(
            torch.empty(size, dtype=torch.uint8),
            torch.empty(out_features if scaled_outputs else 1, dtype=torch.float16),
            out_features=out_features,
            in_features=in_features,
            tile_outputs=tile_outputs,
            tile_inputs=tile_inputs,
            state_bits=state_bits,
            width=width,
            narrow=narrow,
            code=code,
        )

    @classmethod
    def bits(
        cls,
        *,
        out_features: int,
        in_features: int,
        tile_outputs: int,
        tile_inputs: int,
        state_bits: int,  # noqa: ARG003
        width: int,
        narrow: int,
        code: Code,  # noqa: ARG003
        scaled_outputs: bool,
    ) -> dict[str, int]:
        """Stored bits: codes (those of tiles' numbers beyond the weight, too) and scales."""
        tiles = tile_count(out_features, in_features, tile_outputs, tile_inputs)
        return {
            "codes": (tiles * width - narrow) * tile_outputs * tile_inputs,
            "scales": 16 * (out_features if scaled_outputs else 1),
        }

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this module's shapes again."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "tile_outputs": self.tile_outputs,
            "tile_inputs": self.tile_inputs,
            "state_bits": self.state_bits,
            "width": self.width,
            "narrow": self.narrow,
            "code": self.code,
            "scaled_outputs": len(self.scales) > 1,
        }

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, made in float32; `inputs` is all of them (see `tiles`)."""
        values_N = code_values(self.state_bits, self.code, self.codes.device)
        length = self.tile_outputs * self.tile_inputs
        cut = self.narrow * path_bytes(length, self.width - 1)
        parts = []
        if self.narrow:
            parts.append(self._decoded(self.codes[:cut], self.narrow, self.width - 1, values_N))
        if cut < len(self.codes):
            tiles = tile_count(self.out_features, self.in_features, self.tile_outputs, self.tile_inputs)
            parts.append(self._decoded(self.codes[cut:], tiles - self.narrow, self.width, values_N))
        columns = math.ceil(self.in_features / self.tile_inputs)
        tiles_JAio = torch.cat(parts).view(columns, -1, self.tile_inputs, self.tile_outputs)
        dense_PQ = tiles_JAio.permute(1, 3, 0, 2).reshape(-1, columns * self.tile_inputs)
        return (dense_PQ[: self.out_features, : self.in_features] * self.scales.float()[:, None]).to(dtype)

    def _decoded(self, packed: Tensor, tiles: int, width: int, values_N: Tensor) -> Tensor:
        """The numbers (tiles, T) of packed paths."""
        length = self.tile_outputs * self.tile_inputs
        if width == 0:
            return values_N.new_zeros(tiles, length)
        return path_numbers(packed.view(tiles, -1), values_N, width)


def tile_count(out_features: int, in_features: int, tile_outputs: int, tile_inputs: int) -> int:
    """The tiles that cover a weight (O, I)."""
    return math.ceil(out_features / tile_outputs) * math.ceil(in_features / tile_inputs)
