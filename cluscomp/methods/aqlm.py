"""AQLM: sub-vectors of a few inputs as sums of M centroids, chosen by the layer's output (arXiv 2401.06118)."""

from typing import TYPE_CHECKING

from pydantic import Field

from cluscomp.methods.along_inputs import InputCodebooks
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.codebook import CodebookWeight
    from cluscomp.kernels.work import Work
    from cluscomp.solve.layer import SecondMoment


@settings
class Aqlm(InputCodebooks):
    """Add the centroids of M `codebooks` for every D neighbouring inputs of an output.

    The codebooks' shape is chosen as `InputCodebooks` says.

    The start is K-means (`iterations` rounds, sub-vectors weighted by the mean square of their inputs) of the weight,
    then of what is left, and so on. Then in each of `rounds` the codebooks are solved for the codes (`least_squares`
    steps of conjugate gradients) and the codes are searched for the codebooks, sub-vector after sub-vector with the
    `beam` best choices of its codes kept; the codebooks have the last word. `damping` is added to the diagonal of the
    second moment, as a share of its mean.

    Unlike the authors': codes in order and not at random; a beam within a sub-vector and not over an output's whole row
    (at 1, their default, both are coordinate descent); least squares in the place of Adam; no scale for each output.
    Their finetuning of blocks is the stage block_finetune.
    """

    codebooks: int = Field(ge=1, le=8)
    iterations: int = Field(ge=1)
    rounds: int = Field(ge=0)
    least_squares: int = Field(ge=1)
    beam: int = Field(ge=1, le=64)
    damping: float = Field(gt=0, le=1)

    @property
    def added(self) -> int:
        """M: as many as `codebooks` says."""
        return self.codebooks

    def work(self, out_features: int, in_features: int) -> "Work":
        """K-means, and in each round losses of all candidates and conjugate gradients; see `Method.work`."""
        from cluscomp.kernels.work import Work

        shape, numbers = self.shape(out_features, in_features), float(out_features * in_features)
        candidates = numbers / shape.vector_dim * shape.codebook_size * self.codebooks
        squares = Work(flops=2.0 * in_features * numbers, traffic=24.0 * numbers * self.codebooks)
        codes = Work(flops=2.0 * in_features * numbers, distances=candidates * self.beam)
        work = Work(distances=candidates * self.iterations)
        return work + codes * self.rounds + squares * (self.least_squares + 1) * (self.rounds + 1)

    def scratch(self, out_features: int, in_features: int) -> float:
        """Points and what is left of them, codes in 32 bits, losses of candidates; see `Method.scratch`."""
        from cluscomp.solve.along_inputs import CANDIDATES

        shape, numbers = self.shape(out_features, in_features), float(out_features * in_features)
        codes = 8.0 * self.codebooks * numbers / shape.vector_dim
        losses = 8.0 * min(CANDIDATES, self.beam * out_features * shape.codebook_size)
        return 24 * numbers + codes + 8.0 * in_features**2 + losses

    def compress(
        self, weight_OI: "Tensor", statistic: "SecondMoment | None", generator: "torch.Generator"
    ) -> "CodebookWeight":
        """Find codes and codebooks of a weight (O, I); see `Method.compress`."""
        import torch

        from cluscomp.forms.codebook import CodebookWeight, sub_vectors
        from cluscomp.solve.along_inputs import descend, least_squares_codebooks, vector_weights
        from cluscomp.solve.along_outputs import damped
        from cluscomp.solve.kmeans import Recipe, kmeans

        assert statistic is not None  # statistic() gave one
        outputs, inputs = weight_OI.shape
        shape = self.shape(outputs, inputs)
        moment_II = damped(statistic.matrix_II, self.damping)
        recipe = Recipe(self.iterations, "kd", 1.9, move_centroids=True)
        importance_N = vector_weights(moment_II.diagonal(), outputs, shape.vector_dim)
        left_ND = sub_vectors(weight_OI, shape.vector_dim, "in")
        codes, books = [], []
        for _ in range(self.codebooks):
            found = kmeans(left_ND, shape.codebook_size, recipe, generator, importance_N)
            codes.append(found.codes_N.view(-1, outputs))
            books.append(found.centroids_KD)
            left_ND = left_ND - found.centroids_KD[found.codes_N.long()]
        codes_MJO, books_MKD = torch.stack(codes), torch.stack(books)
        for _ in range(self.rounds):
            books_MKD = least_squares_codebooks(weight_OI, codes_MJO, books_MKD, moment_II, self.least_squares)
            codes_MJO = descend(weight_OI, codes_MJO, books_MKD, moment_II, self.beam)
        books_MKD = least_squares_codebooks(weight_OI, codes_MJO, books_MKD, moment_II, self.least_squares)
        return CodebookWeight.from_codes(
            codes_MJO.flatten(1),
            books_MKD,
            out_features=outputs,
            in_features=inputs,
            axis="in",
            storage=self.storage,
        )
