"""What stands beside codes: a mask of the weights that are kept, and an adapter of low rank for what is left out."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cluscomp.forms.codebook import CodebookWeight, sub_vectors
from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.masked import Masked, places_of
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.stored import Stored, in_16_bits
from cluscomp.forms.sum import Sum
from cluscomp.solve import low_rank
from cluscomp.solve.kmeans import Recipe, kmeans

LEVELS = 16  # of an adapter of 4 bits
FIT = Recipe(20, "kd", 1.0, move_centroids=False)  # of these levels
LEAST_SIZE = 1e-3  # of an input beside the others, where errors count by it


def kept_of(inputs: int, share: float, of: int | None) -> tuple[int, int]:
    """How many neighbouring inputs go together, and how many of them are kept: a share of `of`, or of all (None).

    Raises ValueError if that is none.
    """
    group = inputs if of is None else of
    kept = math.floor(share * group + 1e-9)
    if kept < 1:
        raise ValueError(f"beside.keep={share} keeps none of {group} inputs of an output; it needs {1 / group:.2g}")
    return group, kept


def kept_inputs(inputs: int, share: float, of: int | None) -> int:
    """K, the inputs that each output keeps; of fewer neighbours at the end as many as of others, or all of them."""
    group, kept = kept_of(inputs, share, of)
    return inputs // group * kept + min(kept, inputs % group)


def largest(scores_OI: Float[Tensor, "O I"], share: float, of: int | None) -> Bool[Tensor, "O I"]:
    """The mask (O, I) of the largest scores, as many for each output as `kept_inputs` says."""
    outputs, inputs = scores_OI.shape
    group, kept = kept_of(inputs, share, of)
    parts_OGC = F.pad(scores_OI, (0, -inputs % group), value=-torch.inf).view(outputs, -1, group)
    mask_OGC = torch.zeros_like(parts_OGC, dtype=torch.bool).scatter(2, parts_OGC.topk(kept, dim=2).indices, True)
    return mask_OGC.view(outputs, -1)[:, :inputs]


def sizes_of(diagonal_I: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
    """Root mean squares (I,) of inputs, none of them nearly 0 beside the others, from their mean squares (I,)."""
    sizes_I = diagonal_I.sqrt()
    mean = sizes_I.mean()
    return sizes_I.clamp(min=LEAST_SIZE * torch.where(mean > 0, mean, 1.0))


def nearest_of_rank(
    error_OI: Float[Tensor, "O I"],
    rank: int,
    *,
    sizes_I: Float[Tensor, " I"] | None = None,
    moment_II: Float[Tensor, "I I"] | None = None,
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """Factors (O, R) and (R, I), both of one size, whose product is nearest to an error (O, I).

    By its squares; by those of E diag(s) with the `sizes_I` (I,) of inputs (SLiM-LoRA, arXiv 2410.09615, section 3.3);
    or by tr(E H E^T) with their second moment (I, I), positive definite: those of E L, H = L L^T.
    """
    scaled_OI = error_OI if sizes_I is None else error_OI * sizes_I
    left_OM, sizes_M, right_MI, factor_II = low_rank.by_outputs(
        scaled_OI, moment_II, "a larger beside.damping, or more cluster.samples"
    )
    right_MI = low_rank.of_inputs(right_MI[:rank], factor_II)
    right_MI = right_MI if sizes_I is None else right_MI / sizes_I
    left_OR, right_RI = left_OM[:, :rank] * sizes_M[:rank], right_MI
    norms_R = right_RI.square().sum(1).sqrt()
    ratio_R = (sizes_M[:rank] / torch.where(norms_R > 0, norms_R, 1.0)).sqrt()
    ratio_R = torch.where(ratio_R > 0, ratio_R, 1.0)
    return left_OR / ratio_R, right_RI * ratio_R[:, None]


def adapter(
    left_OR: Float[Tensor, "O R"], right_RI: Float[Tensor, "R I"], bits: int, generator: torch.Generator
) -> LowRank:
    """The product of two factors (O, R) and (R, I) as numbers of 16 bits, or of 4 with a table of levels for each.

    Those of 4 are turned at random first, that all ranks are of one size.
    """
    if bits == 16:
        return LowRank(PlainWeight(in_16_bits(left_OR)), PlainWeight(in_16_bits(right_RI)))
    rank = left_OR.shape[1]
    turn_RR = torch.linalg.qr(torch.randn(rank, rank, generator=generator).to(left_OR.device)).Q
    factors = (left_OR @ turn_RR, turn_RR.T @ right_RI)
    return LowRank(*(_in_levels(factor, generator) for factor in factors))


def _in_levels(factor_AB: Tensor, generator: torch.Generator) -> Stored:
    if factor_AB.numel() == 1:
        return PlainWeight(in_16_bits(factor_AB))
    points_N1 = sub_vectors(factor_AB, 1, "out").contiguous()
    found = kmeans(points_N1, min(LEVELS, len(points_N1)), FIT, generator)
    outputs, inputs = factor_AB.shape
    return CodebookWeight.from_codes(
        found.codes_N[None], found.centroids_KD[None], out_features=outputs, in_features=inputs, axis="out"
    )


def bits_beside(outputs: int, inputs: int, *, masked: bool, rank: int | None, bits: int) -> int:
    """Stored bits of a mask (O, I), if there is one, and of an adapter of a rank."""
    total = sum(Masked.own_bits(inner={}, out_features=outputs, in_features=inputs).values()) if masked else 0
    for sides in () if rank is None else ((outputs, rank), (rank, inputs)):
        total += sum(_factor_bits(*sides, bits).values())
    return total


def _factor_bits(outputs: int, inputs: int, bits: int) -> dict[str, int]:
    if bits == 16 or outputs * inputs == 1:
        return PlainWeight.bits(out_features=outputs, in_features=inputs)
    return CodebookWeight.bits(
        out_features=outputs, in_features=inputs, axis="out", vector_dim=1,
        codebook_size=min(LEVELS, outputs * inputs), codebooks=1,
    )  # fmt: skip


def kept(
    weight_OI: Float[Tensor, "O I"], kept_OI: Bool[Tensor, "O I"] | None, number: int, adapter: LowRank | None
) -> Float[Tensor, "O K"]:
    """What a method has to store of a weight (O, I), without what an adapter takes; of a mask the K kept ones."""
    if adapter is not None:
        weight_OI = weight_OI - adapter(torch.float32).detach()
    return weight_OI if kept_OI is None else weight_OI.gather(1, places_of(kept_OI, number))


def whole(inner: Stored, kept_OI: Bool[Tensor, "O I"] | None, adapter: LowRank | None = None) -> Stored:
    """The stored form of a weight (O, I), of what is stored of its kept ones, (O, K), with mask and adapter."""
    masked = inner if kept_OI is None else Masked.keeping(inner, kept_OI)
    return masked if adapter is None else Sum([masked, adapter])
