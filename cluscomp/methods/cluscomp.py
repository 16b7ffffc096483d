"""ClusComp: one K-means codebook for each weight (arXiv 2503.13089, section 3.2), and what its input can add to it."""

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.budget import Shape
    from cluscomp.costs import Work
    from cluscomp.moments import SecondMoment
    from cluscomp.weights import CodebookWeight


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class ClusComp:
    """Cut the weight into sub-vectors and store a codebook of their K-means centroids and a code for each.

    Either `bits` is given, the most bits per weight that may be stored (1 to 8), and the length D and number of
    centroids K are chosen for each matrix; or `vector_dim` (D) and `codebook_size` (K) are fixed by hand.
    `axis` "out" is the paper's: a sub-vector is D neighbouring outputs of one input. `storage` is the type of the
    codebook's values. `iterations`, `init`, `over_relaxation` and `move_centroids` are the recipe of K-means
    (`cluscomp.kmeans.Recipe`); the paper's is 20, random_points, 1 and false.

    The rest spends no bytes and is not in the paper; any of it needs calibration text and axis "out".
    `weighting` "diagonal": a sub-vector counts by the mean square of its input. `assign` "hessian": codes are chosen
    input by input, errors handed on to the inputs to come (`damping` is added to the diagonal of the second moment, as
    a share of its mean). `least_squares`: so many steps towards the codebook of least output error for these codes.
    `descent`: so many times the codes then descend input by input with all others fixed, and the codebook follows.
    """

    bits: float | None = Field(ge=1, le=8)
    vector_dim: int | None = Field(ge=1, le=64)
    codebook_size: int | None = Field(ge=2, le=65_536)
    axis: Literal["out", "in"]
    storage: Literal["float16", "float8", "int8"]
    iterations: int = Field(ge=1)
    init: Literal["random_points", "kd"]
    over_relaxation: float = Field(gt=0, le=2)
    move_centroids: bool
    weighting: Literal["none", "diagonal"]
    assign: Literal["nearest", "hessian"]
    damping: float = Field(gt=0, le=1)
    least_squares: int = Field(ge=0)
    descent: int = Field(ge=0)

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
        if self.axis == "in" and self.statistic() is not None:
            raise ValueError(
                f"method.axis=in needs method.weighting=none, method.assign=nearest, method.least_squares=0 and "
                f"method.descent=0 (here {self.weighting}, {self.assign}, {self.least_squares} and {self.descent})"
            )
        return self

    @property
    def exact(self) -> bool:
        """With a shape by hand; with `bits` the weights themselves decide between some shapes."""
        return self.bits is None

    def check(self, out_features: int, in_features: int) -> None:
        """Whether a codebook fits a weight of this shape; see `Method.check`."""
        self._shapes(out_features, in_features)

    def _shapes(self, out_features: int, in_features: int) -> "list[Shape]":
        """What may be chosen from for a weight of this shape."""
        from cluscomp.budget import Shape, reachable, stored_bits
        from cluscomp.weights import num_sub_vectors

        if self.bits is not None:
            return reachable(out_features, in_features, self.axis, self.bits, self.storage)
        assert self.vector_dim is not None and self.codebook_size is not None  # _either_bits_or_shape
        vectors = num_sub_vectors(out_features, in_features, self.vector_dim, self.axis)
        if self.codebook_size > vectors:
            raise ValueError(
                f"method.codebook_size={self.codebook_size} exceeds the {vectors} sub-vectors of length "
                f"{self.vector_dim} in a {out_features} x {in_features} matrix; take fewer, or give bits=3 instead"
            )
        shape = self.vector_dim, self.codebook_size
        return [Shape(*shape, stored_bits(out_features, in_features, self.axis, *shape, self.storage))]

    def outline(self, out_features: int, in_features: int) -> "CodebookWeight":
        """The stored form with the shape that is best for Gaussian weights; see `Method.outline`."""
        from cluscomp.budget import expected_bits
        from cluscomp.weights import CodebookWeight

        shape = max(self._shapes(out_features, in_features), key=expected_bits)
        return CodebookWeight.empty(
            out_features=out_features,
            in_features=in_features,
            axis=self.axis,
            vector_dim=shape.vector_dim,
            codebook_size=shape.codebook_size,
            codebooks=1,
            storage=self.storage,
        )

    def work(self, out_features: int, in_features: int) -> "Work":
        """K-means, of candidates too, and where asked for codes by feedback and least squares; see `Method.work`."""
        from cluscomp.budget import MEASURE_ITERATIONS, SAMPLE, SHORTLIST, expected_bits
        from cluscomp.costs import Work
        from cluscomp.weights import num_sub_vectors

        shapes = sorted(self._shapes(out_features, in_features), key=expected_bits, reverse=True)[:SHORTLIST]
        numbers, work = out_features * in_features, Work()
        for shape in shapes if len(shapes) > 1 else []:
            vectors = num_sub_vectors(out_features, in_features, shape.vector_dim, self.axis)
            sample = min(vectors, max(SAMPLE, 16 * shape.codebook_size))
            work += _lloyd(sample, shape, min(MEASURE_ITERATIONS, self.iterations))
        vectors = num_sub_vectors(out_features, in_features, shapes[0].vector_dim, self.axis)
        work += _lloyd(vectors, shapes[0], self.iterations)
        every_code = Work(
            distances=float(vectors) * shapes[0].codebook_size,
            flops=2.0 * in_features * numbers,
            traffic=12.0 * numbers,
        )
        if self.assign == "hessian":
            work += every_code + Work(flops=2.0 * in_features**3)
        squares = Work(flops=2.0 * in_features * numbers, traffic=16.0 * numbers) * (self.least_squares + 1)
        if self.least_squares:
            work += squares * (self.descent + 1)
        work += every_code * self.descent
        return work

    def scratch(self, out_features: int, in_features: int) -> float:
        """Points, their sorted copy and codes, or the inverse second moment in 64 bits; see `Method.scratch`."""
        numbers, moment = float(out_features * in_features), float(in_features) ** 2
        kmeans = 12 * numbers
        feedback = 8 * numbers + 24 * moment if self.assign == "hessian" else 0.0
        descent = 12 * numbers + 4 * moment if self.descent else 0.0
        squares = 16 * numbers + 4 * moment if self.least_squares else 0.0
        return max(kmeans, feedback, squares, descent)

    def statistic(self) -> "SecondMoment | None":
        """The second moment of the inputs or its diagonal, if an option asks for it; see `Method.statistic`."""
        full = self.assign == "hessian" or self.least_squares > 0 or self.descent > 0
        if not full and self.weighting == "none":
            return None
        from cluscomp.moments import SecondMoment

        return SecondMoment(full=full)

    def compress(
        self, weight_OI: "Tensor", statistic: "SecondMoment | None", generator: "torch.Generator"
    ) -> "CodebookWeight":
        """Cluster the sub-vectors of a weight (O, I); see `Method.compress`."""
        from cluscomp.budget import choose
        from cluscomp.kmeans import Recipe, kmeans
        from cluscomp.weights import CodebookWeight, num_sub_vectors, sub_vectors

        out_features, in_features = weight_OI.shape

        def importance(vector_dim: int) -> "Tensor | None":
            if self.weighting == "none" or statistic is None:
                return None
            vectors = num_sub_vectors(out_features, in_features, vector_dim, self.axis)
            return statistic.diagonal_I.repeat_interleave(vectors // in_features)

        recipe = Recipe(self.iterations, self.init, self.over_relaxation, self.move_centroids)
        shape = choose(weight_OI, self._shapes(*weight_OI.shape), self.axis, recipe, generator, importance)
        points_ND = sub_vectors(weight_OI, shape.vector_dim, self.axis)
        found = kmeans(points_ND, shape.codebook_size, recipe, generator, importance(shape.vector_dim))
        codes_N, centroids_KD = found.codes_N, found.centroids_KD
        if statistic is not None and statistic.full:
            codes_N, centroids_KD = self._by_output(weight_OI, codes_N, centroids_KD, statistic)
        return CodebookWeight.from_codes(
            codes_N[None],
            centroids_KD[None],
            out_features=out_features,
            in_features=in_features,
            axis=self.axis,
            storage=self.storage,
        )

    def _by_output(
        self, weight_OI: "Tensor", codes_N: "Tensor", centroids_KD: "Tensor", statistic: "SecondMoment"
    ) -> "tuple[Tensor, Tensor]":
        """Codes (N,) and centroids (K, D) chosen by the error of the layer's output, as far as the settings ask."""
        from cluscomp.kernels.codes import code_bits, pack
        from cluscomp.kmeans import nearest
        from cluscomp.output_error import damped, descend_codes, feedback_codes, least_squares_codebook
        from cluscomp.weights import centroid_values

        weight_IO = weight_OI.T.contiguous()
        moment_II = damped(statistic.matrix_II, self.damping)
        codes_IG, bits = codes_N.view(len(weight_IO), -1), code_bits(len(centroids_KD))
        for number in range(self.descent + 1):
            stored_KD = centroid_values(centroids_KD[None], self.storage)[0]
            if number:
                codes_IG = descend_codes(weight_IO, codes_IG, stored_KD, moment_II, nearest)
            elif self.assign == "hessian":
                codes_IG = feedback_codes(weight_IO, stored_KD, moment_II, nearest)
            if self.least_squares:
                packed = pack(codes_IG.flatten(), bits)
                centroids_KD = least_squares_codebook(
                    weight_IO, packed, bits, centroids_KD, moment_II, self.least_squares
                )
        return codes_IG.flatten(), centroids_KD


def _lloyd(vectors: int, shape: "Shape", iterations: int) -> "Work":
    """K-means of some sub-vectors: by brute force, or where it pays with an index.

    That visits some 2.6 times as much for each dimension more.
    """
    from cluscomp.costs import Work

    if shape.vector_dim <= 6 and shape.codebook_size > 256:
        return Work(pruned=float(vectors) * iterations * 2.6 ** (shape.vector_dim - 4))
    return Work(distances=float(vectors) * iterations * shape.codebook_size)
