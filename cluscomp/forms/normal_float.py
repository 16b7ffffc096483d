"""Weights as levels of a normal distribution, times a scale of 8 bits for each block: what QLoRA stores."""

from functools import cache
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from pydantic import Field
from torch import Tensor

from cluscomp.forms.stored import Extent, in_16_bits
from cluscomp.forms.uniform import PackedWeight, divisor, of_groups, spread
from cluscomp.kernels.codes import pack, packed_bytes

TOGETHER = 256  # scales that share a step
COUNTED = 16  # levels up to which a search among them is slower than to compare with each
MOST = 127  # steps of a scale from the mean of all, either way


class NormalFloatWeight(PackedWeight):
    """A weight as numbers of 2 to 8 bits that stand for fixed levels from -1 to 1, times the scale of their group.

    QLoRA's NormalFloat with double quantisation (arXiv 2305.14314, section 3; see `levels`). Stored: `codes`; `scales`
    (O, G) int8, how many steps a group's scale is off the mean of all; `steps` float32, one for 256 scales in a row;
    `mean` (1,) float32. The levels follow from the width. The scales can be trained, and are rounded anew.
    """

    kind = "normal_float"
    trained = "scales"
    steps: Tensor
    mean: Tensor

    def __init__(
        self,
        codes: UInt8[Tensor, " bytes"],
        scales: Int8[Tensor, "O G"],
        steps: Float[Tensor, " S"],
        mean: Float[Tensor, "1"],
        *,
        out_features: int,
        in_features: int,
        width: int,
    ) -> None:
        super().__init__(codes, scales, out_features=out_features, in_features=in_features, width=width)
        self.register_buffer("steps", steps)
        self.register_buffer("mean", mean)

    @classmethod
    def nearest(cls, weight_OI: Float[Tensor, "O I"], width: int, groups: int) -> "NormalFloatWeight":
        """Each weight of (O, I) as the nearest level, by the scale, as stored, that its group's largest size gives.

        Raises ValueError if a weight is not finite or does not fit a 16-bit float.
        """
        outputs, inputs = weight_OI.shape
        rounded = in_8_bits(of_groups(weight_OI, groups, lambda part_OGC: part_OGC.abs().amax(2)))
        values_OI = weight_OI / spread(divisor(from_8_bits(*rounded)), inputs)
        packed = pack(_nearest(values_OI, levels(width, weight_OI.device)).flatten().int(), width)
        return cls(packed, *rounded, out_features=outputs, in_features=inputs, width=width)

    @classmethod
    def empty(
        cls,
        *,
        out_features: Extent,
        in_features: Extent,
        width: Annotated[int, Field(ge=2, le=8)],
        groups: Extent,
    ) -> "NormalFloatWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into."""
        return cls(
            torch.empty(packed_bytes(out_features * in_features, width), dtype=torch.uint8),
            torch.empty(out_features, groups, dtype=torch.int8),
            torch.empty(-(-out_features * groups // TOGETHER), dtype=torch.float32),
            torch.empty(1, dtype=torch.float32),
            out_features=out_features,
            in_features=in_features,
            width=width,
        )

    @classmethod
    def bits(cls, *, out_features: int, in_features: int, width: int, groups: int) -> dict[str, int]:
        """Stored bits: codes, scales with their steps and mean, padding of the packed codes."""
        numbers, scales = out_features * in_features, out_features * groups
        return {
            "codes": numbers * width,
            "scales": 8 * scales + 32 * -(-scales // TOGETHER) + 32,
            "padding": packed_bytes(numbers, width) * 8 - numbers * width,
        }

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, made in float32; `inputs` is all of them (see `tiles`)."""
        levels_K = levels(self.width, self.codes.device)
        values_OI = levels_K.index_select(0, self.unpacked().flatten()).view(self.out_features, self.in_features)
        return (values_OI * spread(self._decoded(), self.in_features)).to(dtype)

    def masters(self) -> dict[str, Tensor]:
        """The scales (O, G) in float32."""
        return {self.trained: self._decoded().detach().clone()}

    def rounded(self, values: Tensor) -> dict[str, Tensor]:
        """The scales in 8 bits, their steps and mean. Raises ValueError if one is not finite or does not fit."""
        return dict(zip(("scales", "steps", "mean"), in_8_bits(values)))

    def _decoded(self) -> Float[Tensor, "O G"]:
        if self.values.is_floating_point():
            return self.values
        return from_8_bits(self.values, self.steps, self.mean)


def _nearest(values_OI: Tensor, levels_K: Tensor) -> Tensor:
    """The number of the level nearest to each value (O, I). Of few levels, to count those passed is fastest."""
    middles = (levels_K[1:] + levels_K[:-1]) / 2
    if len(levels_K) > COUNTED:
        return torch.bucketize(values_OI, middles)
    passed_OI = torch.zeros_like(values_OI, dtype=torch.int8)
    for middle in middles:
        passed_OI += values_OI > middle
    return passed_OI


def levels(width: int, device: torch.device) -> Float[Tensor, " K"]:
    """The K = 2^width levels of NormalFloat (K,), rising from -1 to 1, one of them 0, in float32.

    They are quantiles of the normal distribution, K / 2 from its middle up and one less from there down (QLoRA, section
    3), divided by the largest. The outermost is not 1, which is infinite, but 1 - (1 / 2K + 1 / (2K - 2)) / 2.
    """
    return torch.tensor(_levels(width), device=device)


@cache
def _levels(width: int) -> list[float]:
    half, last = 2 ** (width - 1), 1 - (1 / (4 * 2 ** (width - 1)) + 1 / (4 * 2 ** (width - 1) - 2)) / 2
    up, down = (
        torch.special.ndtri(torch.linspace(last, 0.5, count + 1, dtype=torch.float64, device="cpu")[:-1])
        for count in (half, half - 1)
    )
    found = torch.cat([-down, down.new_zeros(1), up.flip(0)]) / up[0]
    return found.tolist()  # type: ignore[no-any-return]


def in_8_bits(
    scales_OG: Float[Tensor, "O G"],
) -> tuple[Int8[Tensor, "O G"], Float[Tensor, " S"], Float[Tensor, "1"]]:
    """Scales (O, G) as steps from their mean in 8 bits, the size of the steps (S,), the mean (1,).

    Raises ValueError if a scale is not finite or does not fit a 16-bit float.
    """
    in_16_bits(scales_OG)
    flat_N = scales_OG.flatten()
    mean_1 = flat_N.mean()[None]
    away_ST = F.pad(flat_N - mean_1, (0, -len(flat_N) % TOGETHER)).view(-1, TOGETHER)
    steps_S = away_ST.abs().amax(1) / MOST
    numbers_ST = (away_ST / divisor(steps_S)[:, None]).round().to(torch.int8)
    return numbers_ST.flatten()[: len(flat_N)].view_as(scales_OG), steps_S, mean_1


def from_8_bits(
    scales_OG: Int8[Tensor, "O G"], steps_S: Float[Tensor, " S"], mean_1: Float[Tensor, "1"]
) -> Float[Tensor, "O G"]:
    """The scales (O, G) that `in_8_bits` stands for, in float32."""
    steps_OG = steps_S.repeat_interleave(TOGETHER)[: scales_OG.numel()].view(scales_OG.shape)
    return mean_1 + scales_OG * steps_OG
