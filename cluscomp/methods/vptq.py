"""VPTQ: sub-vectors of a few outputs coded with error feedback, and a codebook of what is left (arXiv 2409.17066)."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cluscomp import solve
from cluscomp.methods.along_inputs import InputCodebooks
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.stored import Stored
    from cluscomp.solve.layer import Seen
    from cluscomp.solve.shapes import Matrices, Shape


@settings
class Vptq(InputCodebooks):
    """K-means weighted by the second moment, along the outputs; codes with feedback; a residual codebook, if wanted.

    Length and size of the first codebook are chosen as `InputCodebooks` says, after what the second one takes, which
    has `residual_size` centroids of the same length (null: there is none). K-means has `iterations` rounds, in which a
    sub-vector counts by the mean square of its input. Codes are chosen input by input, errors handed on to the inputs
    to come; the residual codebook is that of K-means of the errors so left, and the codes of both are then chosen in
    turn, with feedback again. `damping` is added to the diagonal of the second moment, as a share of its mean.

    Unlike the authors': our recipe of K-means; no scale and mean for each input (`enable_norm`); no codebook apart for
    outlier inputs (`npercent`, 0 in their published commands). Their finetuning is the stages block_finetune, recover.
    """

    axis: ClassVar[Literal["out", "in"]] = "out"
    residual_size: int | None = Field(ge=2, le=65_536)
    iterations: int = Field(ge=1)
    damping: float = Field(gt=0, le=1)

    def shapes(self, matrices: "Matrices", bits: float) -> "list[Shape]":
        """The best first codebook that leaves room for the residual one, with the bits per weight of both.

        Raises ValueError if none does.
        """
        if self.residual_size is None:
            return super().shapes(matrices, bits)
        found: list[Shape] = []
        for dim, second in self._residuals(matrices):
            if bits > second:
                try:
                    first = solve.shapes.reachable(matrices, self.axis, bits - second, self.storage)
                except ValueError:
                    continue
                found += [replace(one, bits=one.bits + second) for one in first if one.vector_dim == dim]
        if not found:
            raise ValueError(
                f"bits={bits} is out of reach with method.residual_size={self.residual_size} for a "
                f"{matrices[0][0]} x {matrices[0][1]} matrix; take fewer centroids, or null"
            )
        return [max(found, key=self.quality)]

    def with_all(self, matrices: "Matrices", shape: "Shape") -> "Shape":
        """A first codebook's shape with the bits per weight that the residual one takes as well."""
        second = dict(self._residuals(matrices)).get(shape.vector_dim, 0.0)
        return replace(shape, bits=shape.bits + second)

    def _residuals(self, matrices: "Matrices") -> "list[tuple[int, float]]":
        """Each length D that the residual codebook can have, and the bits per weight that it takes with its codes."""
        from cluscomp.forms.codebook import num_sub_vectors

        if self.residual_size is None:
            return []
        most = min(
            max(solve.shapes.MAX_VECTOR_DIM, self.vector_dim or 1), *(out_features for out_features, _ in matrices)
        )
        return [
            (dim, solve.shapes.Shape.of(matrices, self.axis, dim, self.residual_size, self.storage).bits)
            for dim in range(1, most + 1)
            if sum(num_sub_vectors(*matrix, dim, self.axis) for matrix in matrices) >= self.residual_size
        ]

    def quality(self, shape: "Shape") -> float:
        """As for Gaussian weights, with what the residual codes bring."""
        brought = 0.0 if self.residual_size is None else math.log2(self.residual_size) / shape.vector_dim
        return solve.shapes.expected_bits(shape) + brought

    def stored(self, weight_OI: "Tensor", seen: "Seen", generator: "torch.Generator", shape: "Shape") -> "Stored":
        """Find codes and codebooks of a weight (O, I); see `InputCodebooks.stored`."""
        return solve.in_turn.with_residual(
            weight_OI,
            solve.along_outputs.damped(seen.matrix_II, self.damping),
            shape.vector_dim,
            [shape.codebook_size] + ([] if self.residual_size is None else [self.residual_size]),
            self.storage,
            generator,
            iterations=self.iterations,
        )
