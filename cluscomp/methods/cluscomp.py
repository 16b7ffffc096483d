"""ClusComp: a K-means codebook for each weight (arXiv 2503.13089, section 3.2), or one for several of a block.

And what the layers' inputs can add to it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cluscomp.errors import named
from cluscomp.methods import Compressed
from cluscomp.methods.on_grids import check_choice
from cluscomp.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from cluscomp.forms.codebook import CodebookWeight
    from cluscomp.solve.allocate import Menu
    from cluscomp.solve.kmeans import Clustering, Recipe
    from cluscomp.solve.layer import Layer
    from cluscomp.solve.shapes import Matrices, Shape


@settings
class ClusComp:
    """Cut the weight into sub-vectors and store a codebook of their K-means centroids and a code for each.

    Either `bits` is given, the most bits per weight that may be stored (1 to 8), and the length D and number of
    centroids K are chosen for each matrix; or `vector_dim` (D) and `codebook_size` (K) are fixed by hand.
    `axis` "out" is the paper's: a sub-vector is D neighbouring outputs of one input. `storage` is the type of the
    codebook's values. `share`: which weights of a block have one codebook and a scale each, "input" those that read the
    same input (query, key and value; gate and up), "block" all, "none" (the paper) each its own. `allocation` "uniform"
    gives every codebook at most `bits`, which leaves some unspent as codes take whole bits; "fill" spends them, with
    `bits` as the most of a block (nothing else where a block has one codebook, or D and K are fixed), and gives no
    codebook less than about a share `floor` of `bits`. With `measure` the errors of shapes are measured on the weights;
    without, they are those of Gaussian ones, so that shapes follow from the matrices' shapes alone. `iterations`,
    `init`, `over_relaxation` and `move_centroids` are the recipe of K-means (`kmeans.Recipe`); the paper's is 20,
    random_points, 1, false.

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
    share: Literal["none", "input", "block"]
    allocation: Literal["uniform", "fill"]
    measure: bool
    floor: float = Field(ge=0, le=1)
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
    def _fit_together(self) -> "ClusComp":
        check_choice(self.bits, vector_dim=self.vector_dim, codebook_size=self.codebook_size)
        if self.share != "none" and self.storage != "float16":
            raise ValueError(f"method.share={self.share} needs method.storage=float16 (here {self.storage})")
        if self.axis == "in" and self.sees():
            raise ValueError(
                f"method.axis=in needs method.weighting=none, method.assign=nearest, method.least_squares=0 and "
                f"method.descent=0 (here {self.weighting}, {self.assign}, {self.least_squares} and {self.descent})"
            )
        return self

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs or its diagonal, if an option asks for it."""
        if self._full:
            return frozenset({"moment"})
        return frozenset() if self.weighting == "none" else frozenset({"diagonal"})

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Group after group of layers that share a codebook; see `Method.compress`."""
        from cluscomp.solve.allocate import share_out

        groups = self._groups(layers)
        methods = [self] * len(groups)
        if self.bits is not None and self.allocation == "fill" and (len(groups) > 1 or not self.measure):
            methods = [replace(self, **option.settings) for option in share_out([*self.offers(layers)], self.bits)]
        for names, method in zip(groups, methods):
            group = self._opened(layers, names)
            with named(names):
                shape = method.shape(group)
                stored = method.clustered(group, shape)
            yield Compressed(dict(zip(names, stored)), asdict(shape))

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """What the layers that share a codebook may have; one group is open at a time. See `methods.Offers`."""
        from cluscomp.solve.allocate import expected_menu, measured_menu

        assert self.bits is not None  # who asks for offers has looked
        for names in self._groups(layers):
            group = self._opened(layers, names)
            if self.measure:
                yield measured_menu(group, self._shapes, self.bits, self._recipe, self.floor)
            else:
                yield expected_menu(names, group.matrices, self._shapes, self.bits)

    def _opened(self, layers: "dict[str, Layer]", names: list[str]) -> "_Group":
        return _Group([layers[name] for name in names], self, names)

    def _groups(self, layers: "dict[str, Layer]") -> list[list[str]]:
        """The names of the layers that share a codebook, group after group."""
        keys = {"none": lambda name: name, "input": lambda name: layers[name].input, "block": lambda _name: None}
        groups: dict[Any, list[str]] = {}
        for name in layers:
            groups.setdefault(keys[self.share](name), []).append(name)
        return list(groups.values())

    def _shapes(self, matrices: "Matrices", bits: float | None) -> "list[Shape]":
        """What may be chosen from for the codebook of matrices of these shapes."""
        from cluscomp.forms.codebook import num_sub_vectors
        from cluscomp.solve.shapes import Shape, described, reachable

        if bits is not None:
            return reachable(matrices, self.axis, bits, self.storage)
        assert self.vector_dim is not None and self.codebook_size is not None  # check_choice
        vectors = sum(num_sub_vectors(*matrix, self.vector_dim, self.axis) for matrix in matrices)
        if self.codebook_size > vectors:
            raise ValueError(
                f"method.codebook_size={self.codebook_size} exceeds the {vectors} sub-vectors of length "
                f"{self.vector_dim} in {described(matrices)}; take fewer, or give bits=3 instead"
            )
        return [Shape.of(matrices, self.axis, self.vector_dim, self.codebook_size, self.storage)]

    @property
    def _full(self) -> bool:
        """Whether the whole second moment is asked for."""
        return self.assign == "hessian" or self.least_squares > 0 or self.descent > 0

    @property
    def _recipe(self) -> "Recipe":
        from cluscomp.solve.kmeans import Recipe

        return Recipe(self.iterations, self.init, self.over_relaxation, self.move_centroids)

    def shape(self, group: "_Group") -> "Shape":
        """The shape of the codebook of a group: by hand, or the best within `bits`."""
        from cluscomp.solve.shapes import choose, expected_bits

        shapes = self._shapes(group.matrices, self.bits)
        if self.measure:
            return choose(group.points, shapes, self._recipe, group.generator)
        return max(shapes, key=expected_bits)

    def clustered(self, group: "_Group", shape: "Shape") -> "list[CodebookWeight]":
        """The stored forms of a group's layers, with one codebook."""
        import torch

        from cluscomp.forms.codebook import CodebookWeight, num_sub_vectors

        found = group.kmeans(shape, self._recipe)
        counts = [num_sub_vectors(*matrix, shape.vector_dim, self.axis) for matrix in group.matrices]
        codes, centroids_KD = list(found.codes_N.split(counts)), found.centroids_KD
        if self._full:
            codes, centroids_KD = self._by_output(group, codes, centroids_KD)
        stored = [
            CodebookWeight.from_codes(
                codes_N[None],
                centroids_KD[None],
                None if scale is None else torch.tensor([scale], device=codes_N.device),
                out_features=out_features,
                in_features=in_features,
                axis=self.axis,
                storage=self.storage,
            )
            for codes_N, scale, (out_features, in_features) in zip(codes, group.scales, group.matrices)
        ]
        for weight in stored[1:]:
            weight.follow(stored[0])
        return stored

    def _by_output(
        self, group: "_Group", codes: "list[Tensor]", centroids_KD: "Tensor"
    ) -> "tuple[list[Tensor], Tensor]":
        """Codes (N,) and centroids (K, D) chosen by the error of the layers' outputs, as far as the settings ask."""
        from cluscomp.forms.codebook import centroid_values
        from cluscomp.kernels.codes import code_bits, pack
        from cluscomp.solve.along_outputs import Coded, descend_codes, feedback_codes, least_squares_codebook
        from cluscomp.solve.kmeans import nearest

        weights = [weight_OI.T.contiguous() for weight_OI in group.weights]
        moments, bits = group.moments(), code_bits(len(centroids_KD))
        coded = [codes_N.view(len(weight_IO), -1) for codes_N, weight_IO in zip(codes, weights)]
        for number in range(self.descent + 1):
            stored_KD = centroid_values(centroids_KD[None], self.storage)[0]
            if number:
                coded = [
                    descend_codes(weight_IO, codes_IG, stored_KD, moment_II, nearest)
                    for weight_IO, codes_IG, moment_II in zip(weights, coded, moments)
                ]
            elif self.assign == "hessian":
                coded = [
                    feedback_codes(weight_IO, stored_KD, moment_II, nearest)
                    for weight_IO, moment_II in zip(weights, moments)
                ]
            if self.least_squares:
                packed = [pack(codes_IG.flatten(), bits) for codes_IG in coded]
                layers = [Coded(*layer) for layer in zip(weights, packed, moments)]
                centroids_KD = least_squares_codebook(layers, bits, centroids_KD, self.least_squares)
        return [codes_IG.flatten() for codes_IG in coded], centroids_KD


class _Group:
    """Layers that share a codebook, as K-means and the choice of codes see them.

    Of several layers each weight is divided by its size and each second moment by its mean diagonal, so that a layer
    counts by its relative error. Scales are relative to the size of all, so that the codebook is as large as weights.
    """

    def __init__(self, layers: "list[Layer]", method: ClusComp, names: Sequence[str] = ()) -> None:
        self._layers, self._method, self.names = layers, method, names
        self.weights = [layer.weight_OI.float() for layer in layers]
        self.matrices = [(layer.weight_OI.shape[0], layer.weight_OI.shape[1]) for layer in layers]
        self.numbers = sum(weight.numel() for weight in self.weights)
        self.generator = layers[0].generator
        self.scales: list[float | None] = [None]
        if len(layers) > 1:
            squares = [float(weight.square().mean()) for weight in self.weights]
            mean = sum(square * weight.numel() for square, weight in zip(squares, self.weights)) / self.numbers
            scales = [(square / mean) ** 0.5 if square else 1.0 for square in squares]
            self.weights = [weight / scale for weight, scale in zip(self.weights, scales)]
            self.scales = [*scales]

    def points(self, vector_dim: int) -> "tuple[Tensor, Tensor | None]":
        """The sub-vectors (N, D) of all layers and what each counts, (N,), or None."""
        from cluscomp.forms.codebook import num_sub_vectors, sub_vectors

        points = [sub_vectors(weight, vector_dim, self._method.axis) for weight in self.weights]
        if self._method.weighting == "none":
            return _joined(points), None
        counts = []
        for layer, (out_features, in_features) in zip(self._layers, self.matrices):
            diagonal_I = layer.show().diagonal_I
            vectors = num_sub_vectors(out_features, in_features, vector_dim, self._method.axis)
            counts.append((diagonal_I / self._mean(diagonal_I)).repeat_interleave(vectors // in_features))
        return _joined(points), _joined(counts)

    def kmeans(self, shape: "Shape", recipe: "Recipe") -> "Clustering":
        """Centroids and codes of all sub-vectors."""
        from cluscomp.solve.kmeans import kmeans

        points_ND, weights_N = self.points(shape.vector_dim)
        return kmeans(points_ND, shape.codebook_size, recipe, self.generator, weights_N)

    def moments(self) -> "list[Tensor]":
        """The damped second moment (I, I) of each layer's inputs, one for layers with one input."""
        from cluscomp.solve.along_outputs import damped

        made: dict[int, Tensor] = {}
        for layer in self._layers:
            if layer.input not in made:
                made[layer.input] = damped(layer.show().matrix_II, self._method.damping)
                if len(self._layers) > 1:
                    made[layer.input] /= self._mean(made[layer.input].diagonal())
        return [made[layer.input] for layer in self._layers]

    @property
    def energy(self) -> float:
        """The mean square of the weights, weighted as K-means weights them."""
        points_ND, weights_N = self.points(1)
        squares_N = points_ND.square().sum(1)
        return float((squares_N if weights_N is None else squares_N * weights_N).mean()) or 1.0

    def _mean(self, diagonal_I: "Tensor") -> float:
        return float(diagonal_I.mean()) or 1.0 if len(self._layers) > 1 else 1.0


def _joined(parts: "list[Tensor]") -> "Tensor":
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts)
