"""Weights as whole numbers of a few bits on uniform grids: what round-to-nearest, GPTQ and AWQ store."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from cluscomp.forms.stored import Extent, Single, Width, in_16_bits
from cluscomp.kernels.codes import pack, packed_bytes, unpack

Zeros = Literal["none", "whole", "float16"]


class PackedWeight(Single):
    """What weights as numbers of a few bits, with values for each group of inputs, have in common.

    `codes`, uint8, are the numbers of (O, I) packed at `width` bits each (kernels/codes.py). The values are a parameter
    of float16.
    """

    codes: Tensor

    def __init__(
        self, codes: UInt8[Tensor, " bytes"], values: Tensor, *, out_features: int, in_features: int, width: int
    ) -> None:
        """The values are (O, G, ...): of G groups of inputs for each output."""
        super().__init__()
        self.out_features, self.in_features, self.width = out_features, in_features, width
        self.register_buffer("codes", codes)
        self.register_parameter(self.trained, nn.Parameter(values, requires_grad=values.is_floating_point()))

    @property
    def groups(self) -> int:
        """G, the groups of inputs that each output has."""
        return self.values.shape[1]

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this module's shapes again."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "width": self.width,
            "groups": self.groups,
        }

    def unpacked(self) -> Int[Tensor, "O I"]:
        """The numbers as int32 (O, I)."""
        return unpack(self.codes, self.width, self.out_features * self.in_features).view(-1, self.in_features)

    def divides(self, group: int) -> bool:
        """Whether every group is a part of one of `group` neighbouring inputs."""
        return self.in_features % group == 0 and self.groups * group % self.in_features == 0


class UniformWeight(PackedWeight):
    """A weight as whole numbers q of 1 to 8 bits: scale (q - zero), with a scale and a zero for each group of inputs.

    Stored: `codes`; `scales` (O, G) float16; unless symmetric `zeros`, uint8, whole numbers of (O, G) packed likewise,
    or any numbers, (O, G) float16; and for methods that scale inputs `inputs` (I,) float16, by which the columns are
    multiplied. An output's inputs are cut into G neighbouring groups as equal as can be. A symmetric grid has its zero
    at 2^(width - 1), the one of 1 bit between its two values. Scales can be trained (EfficientQAT, arXiv 2407.11062,
    does likewise).
    """

    kind = "uniform"
    trained = "scales"
    learns = frozenset({"values", "clipping", "rounding", "weights"})
    scales: nn.Parameter
    zeros: Tensor | None
    inputs: Tensor | None

    def __init__(
        self,
        codes: UInt8[Tensor, " bytes"],
        scales: Float[Tensor, "O G"],
        zeros: Tensor | None = None,
        inputs: Float[Tensor, " I"] | None = None,
        *,
        out_features: int,
        in_features: int,
        width: int,
    ) -> None:
        super().__init__(codes, scales, out_features=out_features, in_features=in_features, width=width)
        self.register_buffer("zeros", zeros)
        self.register_buffer("inputs", inputs)

    @classmethod
    def from_codes(
        cls,
        codes_OI: Int[Tensor, "O I"],
        scales_OG: Float[Tensor, "O G"],
        zeros_OG: Tensor | None,
        width: int,
        inputs_I: Float[Tensor, " I"] | None = None,
    ) -> "UniformWeight":
        """Build from numbers (O, I), scales (O, G), zeros (O, G) or None if symmetric.

        Scales, and zeros that are no integers, are rounded to 16 bits. Raises ValueError if one does not fit.
        """
        whole = zeros_OG is not None and not zeros_OG.is_floating_point()
        return cls(
            pack(codes_OI.flatten(), width),
            in_16_bits(scales_OG),
            None if zeros_OG is None else pack(zeros_OG.flatten(), width) if whole else in_16_bits(zeros_OG),
            None if inputs_I is None else in_16_bits(inputs_I),
            out_features=codes_OI.shape[0],
            in_features=codes_OI.shape[1],
            width=width,
        )

    @classmethod
    def empty(
        cls,
        *,
        out_features: Extent,
        in_features: Extent,
        width: Width,
        groups: Extent,
        zeros: Zeros,
        scaled_inputs: bool,
    ) -> "UniformWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into."""
        kinds = {
            "none": None,
            "whole": torch.empty(packed_bytes(out_features * groups, width), dtype=torch.uint8),
            "float16": torch.empty(out_features, groups, dtype=torch.float16),
        }
        return cls(
            torch.empty(packed_bytes(out_features * in_features, width), dtype=torch.uint8),
            torch.empty(out_features, groups, dtype=torch.float16),
            kinds[zeros],
            torch.empty(in_features, dtype=torch.float16) if scaled_inputs else None,
            out_features=out_features,
            in_features=in_features,
            width=width,
        )

    @classmethod
    def bits(
        cls, *, out_features: int, in_features: int, width: int, groups: int, zeros: Zeros, scaled_inputs: bool
    ) -> dict[str, int]:
        """Stored bits: codes, scales (of inputs too), zeros, padding of the packed streams."""
        numbers, grids = out_features * in_features, out_features * groups
        padding = packed_bytes(numbers, width) * 8 - numbers * width
        if zeros == "whole":
            padding += packed_bytes(grids, width) * 8 - grids * width
        return {
            "codes": numbers * width,
            "scales": 16 * (grids + (in_features if scaled_inputs else 0)),
            "zeros": grids * {"none": 0, "whole": width, "float16": 16}[zeros],
            "padding": padding,
        }

    def offsets(self) -> Float[Tensor, "O G"]:
        """The zeros (O, G); all groups of a symmetric grid have one."""
        if self.zeros is None:
            return torch.full_like(self.scales, middle(self.width), dtype=torch.float32, requires_grad=False)
        if self.kind_of_zeros == "float16":
            return self.zeros.float()
        return unpack(self.zeros, self.width, self.scales.numel()).view(self.scales.shape).float()

    @property
    def kind_of_zeros(self) -> Zeros:
        """Whether zeros are stored, and how."""
        return "none" if self.zeros is None else "float16" if self.zeros.is_floating_point() else "whole"

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, made in float32; `inputs` is all of them (see `tiles`)."""
        steps_OI = self.unpacked() - spread(self.offsets(), self.in_features)
        dense_OI = steps_OI * spread(self.scales.float(), self.in_features)
        return (dense_OI if self.inputs is None else dense_OI * self.inputs.float()).to(dtype)

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this module's shapes again."""
        return super().spec() | {"zeros": self.kind_of_zeros, "scaled_inputs": self.inputs is not None}

    def lies_on(self, *, width: int, group: int) -> bool:
        """Whether every group of this grid is a part of one of `group` inputs on a grid of the same width."""
        return self.width == width and self.inputs is None and self.divides(group)


def middle(width: int) -> float:
    """The zero of a symmetric grid: 2^(width - 1), and 1/2 for 1 bit, whose two values are then of one size."""
    return 2.0 ** (width - 1) if width > 1 else 0.5


def bounds(in_features: int, groups: int) -> list[slice]:
    """The groups' ranges of inputs, as equal as can be: I / G each where that is whole."""
    ends = [-(-number * in_features // groups) for number in range(groups + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def of_groups(values_OI: Float[Tensor, "O I"], groups: int, of: Callable[[Float[Tensor, "O G C"]], Tensor]) -> Tensor:
    """What `of` makes of some groups' values, (O, g, C) -> (O, g, ...), for all groups: (O, I) -> (O, G, ...).

    Groups of one size go together, so it is called at most twice.
    """
    outputs, inputs = values_OI.shape
    if inputs % groups == 0:
        return of(values_OI.unflatten(1, (groups, -1)))
    parts = bounds(inputs, groups)
    pieces: list[Tensor] = []
    order: list[int] = []
    for size in (inputs // groups, inputs // groups + 1):
        alike = [number for number, part in enumerate(parts) if part.stop - part.start == size]
        columns = [i for number in alike for i in range(parts[number].start, parts[number].stop)]
        chosen_I = torch.tensor(columns, device=values_OI.device)
        pieces.append(of(values_OI.index_select(1, chosen_I).view(outputs, len(alike), size)))
        order += alike
    back_G = torch.tensor([order.index(number) for number in range(groups)], device=values_OI.device)
    return torch.cat(pieces, 1).index_select(1, back_G)


def spread(values_OG: Float[Tensor, "O G"], in_features: int) -> Float[Tensor, "O I"]:
    """The value of each input's group: (O, G) -> (O, I)."""
    groups = values_OG.shape[1]
    if in_features % groups == 0:
        return values_OG.repeat_interleave(in_features // groups, 1)
    return values_OG.index_select(1, torch.arange(in_features, device=values_OG.device) * groups // in_features)


def grid_for(
    weight_OC: Float[Tensor, "O C"], width: int, *, symmetric: bool, shrink: float = 1.0
) -> tuple[Float[Tensor, " O"], Float[Tensor, " O"]]:
    """Scale (O,), as its 16 bits hold it, and zero (O,) for each output's weights (O, C) of one group.

    The grid spans from the least to the largest weight and always has 0; symmetric ones span the largest size both
    ways. `shrink` narrows it by that factor. Of 1 bit the two values are plus and minus the mean size, the best there
    are. Raises ValueError for weights that are not finite or too large for a 16-bit scale.
    """
    mean_O = weight_OC.abs().mean(1) if symmetric and width == 1 else None
    return _grid(weight_OC.amin(1) * shrink, weight_OC.amax(1) * shrink, mean_O, width, symmetric=symmetric)


def _grid(low: Tensor, high: Tensor, mean: Tensor | None, width: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero from the least and largest weight of a group, and its mean size if symmetric and of 1 bit."""
    levels = 2**width - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        size = torch.maximum(-low, high) if mean is None else mean
        scale = in_16_bits(2 * size / levels).float()
        return scale, torch.full_like(scale, middle(width))
    scale = in_16_bits((high - low) / levels).float()
    return scale, (-low / divisor(scale)).round().clamp(0, levels)


def divisor(scale: Tensor) -> Tensor:
    """Scales of any shape, but 1 for those of 0, which the weights of a dead group (or tiny ones) have."""
    return torch.where(scale > 0, scale, 1.0)


def nearest(values: Tensor, scale: Tensor, zero: Tensor, width: int) -> Tensor:
    """The numbers (int32) of the grid that are nearest to some values; all of one shape, or spread to it."""
    return (values / divisor(scale) + zero).round().clamp(0, 2**width - 1).to(torch.int32)


def grids_for(
    weight_OI: Float[Tensor, "O I"], width: int, groups: int, *, symmetric: bool
) -> tuple[Float[Tensor, "O G"], Float[Tensor, "O G"]]:
    """Scales and zeros (O, G) of all groups of a weight (O, I); see `grid_for`."""
    mean_OG = None
    if symmetric and width == 1:
        mean_OG = of_groups(weight_OI, groups, lambda part_OGC: part_OGC.abs().mean(2))
    low_OG = of_groups(weight_OI, groups, lambda part_OGC: part_OGC.amin(2))
    high_OG = of_groups(weight_OI, groups, lambda part_OGC: part_OGC.amax(2))
    return _grid(low_OG, high_OG, mean_OG, width, symmetric=symmetric)


def rounded_weight(
    weight_OI: Float[Tensor, "O I"], scales_OG: Tensor, zeros_OG: Tensor, width: int, *, symmetric: bool
) -> UniformWeight:
    """Each weight of (O, I) rounded to the nearest number of its group's grid (scales and zeros (O, G))."""
    inputs = weight_OI.shape[1]
    codes_OI = nearest(weight_OI, spread(scales_OG, inputs), spread(zeros_OG, inputs), width)
    return UniformWeight.from_codes(codes_OI, scales_OG, None if symmetric else zeros_OG.int(), width)
