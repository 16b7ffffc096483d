"""Weights as vectors of 8 numbers of tables cut from the E8 lattice: what QuIP# (arXiv 2402.04396) stores."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from cluscomp.forms.stored import Extent, Single, in_16_bits

DIM = 8
PADDED = 29  # of the table's 256 rows, beside the 227 of squared norm 10 at most
BYTES = {"e8p": 2, "e8": 1}  # of a code
# by bits a number: tables whose vectors are added, and by what they are multiplied for Gaussian numbers of variance 1
# (measured; these leave 0.32, 0.091, 0.029 and 0.0083 of the variance)
TABLES: dict[int, tuple[tuple[str, float], ...]] = {
    0: (),
    1: (("e8", 1.65),),
    2: (("e8p", 0.98),),
    3: (("e8p", 1.0), ("e8", 0.5)),
    4: (("e8p", 1.08), ("e8p", 0.29)),
}


class LatticeWeight(Single):
    """A weight as codes of vectors of 8 neighbouring inputs of an output, sums of vectors of tables that are computed.

    Stored: `codes`, uint8, and `scales` float16: one of the whole weight, (1,), or of each output, (O,), which can be
    trained. A number takes 1 to 4 bits (`width`): a vector of 1 bit is one of 256 short ones of E8, of 2 bits one of
    E8P's 65,536; 3 and 4 bits are E8P and one of these on what is left. Vectors are numbered output by output, then by
    their inputs; the first `narrow` of them have a bit a number less (of 0 bits they are 0). Codes of a vector's first
    table come first, then those of its second. The last vectors may reach beyond the inputs; all their bits count.
    """

    kind = "lattice"
    trained = "scales"
    codes: Tensor
    scales: nn.Parameter

    def __init__(
        self,
        codes: UInt8[Tensor, " bytes"],
        scales: Float[Tensor, " C"],
        *,
        out_features: int,
        in_features: int,
        width: int,
        narrow: int,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.width, self.narrow = out_features, in_features, width, narrow
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(scales, requires_grad=scales.is_floating_point())

    @classmethod
    def from_codes(
        cls, first: Sequence[Tensor], later: Sequence[Tensor], scales_C: Float[Tensor, " C"], **spec: Any
    ) -> "LatticeWeight":
        """Build from the codes of the narrow vectors and of all later ones, for each table one tensor in their order.

        Scales, (1,) or (O,), are rounded to 16 bits. Raises ValueError if one does not fit. `spec` is that of `empty`,
        without `scaled_outputs`.
        """
        sizes = [BYTES[name] for bits in (spec["width"] - 1, spec["width"]) for name, _ in TABLES[bits]]
        parts = [_bytes_of(codes_N, size) for codes_N, size in zip([*first, *later], sizes, strict=True)]
        return cls(torch.cat(parts), in_16_bits(scales_C), **spec)

    @classmethod
    def empty(
        cls,
        *,
        out_features: Extent,
        in_features: Extent,
        width: Annotated[int, Field(ge=1, le=4)],
        narrow: int,
        scaled_outputs: bool,
    ) -> "LatticeWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into.

        Raises ValueError if there are fewer vectors than narrow ones.
        """
        vectors = vector_count(out_features, in_features)
        if not 0 <= narrow <= vectors:
            raise ValueError(f"{narrow} narrow vectors of {vectors}")
        return cls(
            torch.empty(vectors * width - narrow, dtype=torch.uint8),
            torch.empty(out_features if scaled_outputs else 1, dtype=torch.float16),
            out_features=out_features,
            in_features=in_features,
            width=width,
            narrow=narrow,
        )

    @classmethod
    def bits(
        cls, *, out_features: int, in_features: int, width: int, narrow: int, scaled_outputs: bool
    ) -> dict[str, int]:
        """Stored bits: codes (those of vectors' numbers beyond the inputs, too) and scales."""
        return {
            "codes": DIM * (vector_count(out_features, in_features) * width - narrow),
            "scales": 16 * (out_features if scaled_outputs else 1),
        }

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this module's shapes again."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "width": self.width,
            "narrow": self.narrow,
            "scaled_outputs": len(self.scales) > 1,
        }

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, made in float32; `inputs` is all of them (see `tiles`)."""
        cut = self.narrow * (self.width - 1)
        wide = vector_count(self.out_features, self.in_features) - self.narrow
        parts = [_vectors(self.codes[:cut], self.narrow, self.width - 1), _vectors(self.codes[cut:], wide, self.width)]
        vectors_JOD = torch.cat(parts).view(-1, self.out_features, DIM)
        dense_OI = vectors_JOD.transpose(0, 1).flatten(1)[:, : self.in_features]
        return (dense_OI * self.scales.float()[:, None]).to(dtype)


def vector_count(out_features: int, in_features: int) -> int:
    """The vectors that cover a weight (O, I)."""
    return out_features * math.ceil(in_features / DIM)


def _vectors(codes: Tensor, number: int, width: int) -> Tensor:
    """The sums (number, 8) of the tables' vectors that stored codes of `width` bits a number stand for."""
    sum_ND, first = torch.zeros(number, DIM, device=codes.device), 0
    for name, factor in TABLES[width]:
        end = first + number * BYTES[name]
        bytes_NB = codes[first:end].view(number, BYTES[name]).int()
        codes_N = bytes_NB[:, 0] if BYTES[name] == 1 else bytes_NB[:, 0] | bytes_NB[:, 1] << 8
        sum_ND = sum_ND + factor * F.embedding(codes_N, table(name, codes.device))
        first = end
    return sum_ND


def _bytes_of(codes_N: Tensor, size: int) -> Tensor:
    """Codes (N,) as bytes, (N size,), the lowest first."""
    shifts = torch.arange(size, device=codes_N.device) * 8
    return (codes_N[:, None].int() >> shifts & 255).to(torch.uint8).flatten()


@cache
def table(name: str, device: torch.device) -> Float[Tensor, "K D"]:
    """The vectors of a table, "e8p" (65536, 8) or "e8" (256, 8), in float32."""
    if device.type == "meta":
        return torch.empty(256 ** BYTES[name], DIM, device=device)
    return (e8p() if name == "e8p" else short_e8()).to(device)


def e8p() -> Float[Tensor, "K D"]:
    """E8P (65536, 8): 256 rows of half-integers, with all signs of an even sum, moved by 1/4 either way.

    The rows are the 227 of sizes whose squared norm is 10 at most, and 29 of those of squared norm 12 (five times 3/2;
    the authors' 29 are others of the same 56). All vectors lie in E8 + 1/4. A code is the row's number, 7 bits for
    signs of the first 7 numbers (the last one follows) and a bit for the way.
    """
    device = torch.device("cpu")
    sizes_RD = torch.cartesian_prod(*[torch.tensor([0.5, 1.5, 2.5], device=device)] * DIM)
    norm_R = sizes_RD.square().sum(1)
    more_RD = sizes_RD[(norm_R == 12) & (sizes_RD.amax(1) == 1.5)]
    rows_RD = torch.cat([sizes_RD[norm_R <= 10], more_RD[:PADDED]])
    free_SD = 1.0 - 2 * (torch.arange(128, device=device)[:, None] >> torch.arange(DIM, device=device) & 1)
    signed_RSD = rows_RD[:, None] * free_SD  # the last number is still positive
    odd_RS = signed_RSD.sum(2) % 2
    signed_RSD[:, :, -1] *= 1 - 2 * odd_RS
    moves = torch.tensor([0.25, -0.25], device=device)
    return (signed_RSD[:, :, None] + moves[:, None]).reshape(-1, DIM)


def short_e8() -> Float[Tensor, "K D"]:
    """256 short vectors (256, 8) of E8: 0, all 240 of squared norm 2, and 15 of squared norm 4 (2 in one place)."""
    device = torch.device("cpu")
    whole_RD = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], device=device)] * DIM)
    half_RD = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], device=device)] * DIM)
    twos_RD = 2 * torch.eye(DIM, device=device)
    return torch.cat(
        [
            torch.zeros(1, DIM, device=device),
            whole_RD[whole_RD.square().sum(1) == 2],
            half_RD[half_RD.sum(1) % 2 == 0],
            torch.cat([twos_RD, -twos_RD])[:15],
        ]
    )
