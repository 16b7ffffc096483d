"""ClusComp: one K-means codebook for each weight (arXiv 2503.13089, section 3.2)."""

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.weights import CodebookWeight


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class ClusComp:
    """Cut the weight into sub-vectors and store a codebook of their K-means centroids and a code for each.

    Either `bits` is given, the most bits per weight that may be stored (1 to 8), and the length D and number of
    centroids K are chosen for each matrix; or `vector_dim` (D) and `codebook_size` (K) are fixed by hand.
    `axis` "out" is the paper's: a sub-vector is D neighbouring outputs of one input. The last four are the recipe of
    K-means (`cluscomp.kmeans.Recipe`); the paper's is 20, random_points, 1 and false.
    """

    bits: float | None = Field(ge=1, le=8)
    vector_dim: int | None = Field(ge=1, le=64)
    codebook_size: int | None = Field(ge=2, le=65_536)
    axis: Literal["out", "in"]
    iterations: int = Field(ge=1)
    init: Literal["random_points", "kd"]
    over_relaxation: float = Field(gt=0, le=2)
    move_centroids: bool

    @model_validator(mode="after")
    def _either_bits_or_shape(self) -> "ClusComp":
        fixed = (self.vector_dim, self.codebook_size)
        if self.bits is None and None in fixed:
            raise ValueError("give bits=3 (any number from 1 to 8), or both method.vector_dim and method.codebook_size")
        if self.bits is not None and fixed != (None, None):
            raise ValueError(
                f"bits={self.bits} chooses method.vector_dim and method.codebook_size for each matrix, "
                f"so they cannot be given too (here {self.vector_dim} and {self.codebook_size})"
            )
        return self

    def check(self, out_features: int, in_features: int) -> None:
        """Whether a codebook fits a weight of this shape; see `Method.check`."""
        from cluscomp import budget
        from cluscomp.weights import num_sub_vectors

        if self.bits is not None:
            budget.reachable(out_features, in_features, self.axis, self.bits)
            return
        assert self.vector_dim is not None and self.codebook_size is not None  # _either_bits_or_shape
        vectors = num_sub_vectors(out_features, in_features, self.vector_dim, self.axis)
        if self.codebook_size > vectors:
            raise ValueError(
                f"method.codebook_size={self.codebook_size} exceeds the {vectors} sub-vectors of length "
                f"{self.vector_dim} in a {out_features} x {in_features} matrix; take fewer, or give bits=3 instead"
            )

    def compress(self, weight_OI: "Tensor", generator: "torch.Generator") -> "CodebookWeight":
        """Cluster the sub-vectors of a weight (O, I); see `Method.compress`."""
        from cluscomp import budget
        from cluscomp.kmeans import Recipe, kmeans
        from cluscomp.weights import CodebookWeight, sub_vectors

        recipe = Recipe(self.iterations, self.init, self.over_relaxation, self.move_centroids)
        vector_dim, codebook_size = self.vector_dim, self.codebook_size
        if self.bits is not None:
            shape = budget.choose(weight_OI, self.bits, self.axis, recipe, generator)
            vector_dim, codebook_size = shape.vector_dim, shape.codebook_size
        assert vector_dim is not None and codebook_size is not None  # _either_bits_or_shape
        points_ND = sub_vectors(weight_OI, vector_dim, self.axis)
        found = kmeans(points_ND, codebook_size, recipe, generator)
        out_features, in_features = weight_OI.shape
        return CodebookWeight.from_codes(
            found.codes_N[None],
            found.centroids_KD[None],
            out_features=out_features,
            in_features=in_features,
            axis=self.axis,
        )
