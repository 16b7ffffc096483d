"""Weights as numbers of a few bits that look up their value in a small table: what SqueezeLLM stores."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cluscomp.forms.stored import Extent, Width, in_16_bits
from cluscomp.forms.uniform import PackedWeight, of_groups, spread
from cluscomp.kernels.codes import pack, packed_bytes
from cluscomp.kernels.levels import best_levels


class TableWeight(PackedWeight):
    """A weight as numbers of 1 to 8 bits, each the place of its value in the table of its group of inputs.

    Stored: `codes`, and `codebooks` (O, G, K) float16: K = 2^width values for each of an output's G groups of inputs,
    as equal as can be. The tables can be trained, as codebooks of vectors can.
    """

    kind = "lookup"
    trained = "codebooks"
    codebooks: nn.Parameter

    def __init__(
        self,
        codes: UInt8[Tensor, " bytes"],
        codebooks: Float[Tensor, "O G K"],
        *,
        out_features: int,
        in_features: int,
    ) -> None:
        """Codes of (O, I), packed, and tables (O, G, K)."""
        width = (codebooks.shape[2] - 1).bit_length()
        super().__init__(codes, codebooks, out_features=out_features, in_features=in_features, width=width)

    @classmethod
    def nearest(cls, weight_OI: Float[Tensor, "O I"], levels_OGK: Float[Tensor, "O G K"]) -> "TableWeight":
        """Each weight of (O, I) as the nearest of its group's levels (O, G, K), which rise.

        Levels are rounded to 16 bits. Raises ValueError if one does not fit.
        """
        tables_OGK = in_16_bits(levels_OGK)
        levels_OGK, inputs = tables_OGK.float(), weight_OI.shape[1]
        codes_OI = torch.zeros_like(weight_OI, dtype=torch.int32)
        for lower_OG, upper_OG in zip(levels_OGK.unbind(2), levels_OGK[:, :, 1:].unbind(2)):
            codes_OI += weight_OI > spread((lower_OG + upper_OG) / 2, inputs)
        width = (levels_OGK.shape[2] - 1).bit_length()
        packed = pack(codes_OI.flatten(), width)
        return cls(packed, tables_OGK, out_features=len(weight_OI), in_features=inputs)

    @classmethod
    def empty(cls, *, out_features: Extent, in_features: Extent, width: Width, groups: Extent) -> "TableWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into."""
        return cls(
            torch.empty(packed_bytes(out_features * in_features, width), dtype=torch.uint8),
            torch.empty(out_features, groups, 2**width, dtype=torch.float16),
            out_features=out_features,
            in_features=in_features,
        )

    @classmethod
    def bits(cls, *, out_features: int, in_features: int, width: int, groups: int) -> dict[str, int]:
        """Stored bits: codes, tables, padding of the packed codes."""
        numbers = out_features * in_features
        return {
            "codes": numbers * width,
            "codebooks": out_features * groups * 2**width * 16,
            "padding": packed_bytes(numbers, width) * 8 - numbers * width,
        }

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`; `inputs` is all of them (see `tiles`)."""
        tables_OE = self.codebooks.to(dtype).flatten(1)
        first_1G = torch.arange(self.groups, device=tables_OE.device)[None] * self.codebooks.shape[2]
        return tables_OE.gather(1, (self.unpacked() + spread(first_1G, self.in_features)).long())

    def lies_on(self, *, width: int, group: int) -> bool:
        """Whether every group has as many values as there are on a grid of `width`, of a part of `group` inputs."""
        return self.width >= width and self.divides(group)


def tables_for(
    weight_OI: Float[Tensor, "O I"], importance_I: Float[Tensor, " I"], width: int, groups: int
) -> Float[Tensor, "O G K"]:
    """The 2^width levels (O, G, K) of each group of inputs with the least weighted squared error; (O, I), (I,).

    Exact. Raises ValueError for weights that are not finite.
    """
    if not bool(weight_OI.isfinite().all()):
        raise ValueError("NaN or infinity among its weights")

    def levels(both_PGC: Tensor) -> Tensor:
        """Of weights and, below them, what each counts: (2 O, g, C) -> (O, g, K)."""
        weight_OGC, mass_OGC = both_PGC.chunk(2)
        found_RK = best_levels(weight_OGC.flatten(0, 1), mass_OGC.flatten(0, 1), 2**width)
        return found_RK.view(*weight_OGC.shape[:2], -1)

    return of_groups(torch.cat([weight_OI, importance_I.expand_as(weight_OI)]), groups, levels)
