"""Layers that share a codebook: one clustering of them all, and codes and codebook by what their outputs lose."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cluscomp.forms.codebook import Axis, CodebookWeight, Storage, centroid_values, num_sub_vectors, sub_vectors
from cluscomp.kernels.codes import code_bits, pack
from cluscomp.kernels.counting import once
from cluscomp.kernels.lloyd_torch import Clustering
from cluscomp.solve.along_outputs import Coded, damped, descend_codes, feedback_codes, least_squares_codebook
from cluscomp.solve.kmeans import Recipe, kmeans
from cluscomp.solve.layer import Layer
from cluscomp.solve.shapes import Effort, Shape, choose, expected_bits

ENOUGH = 3e-3  # of what steps towards a codebook took off the error so far: one that takes off less is the last


class Group:
    """Layers that share a codebook, as K-means and the choice of codes see them.

    Of several layers each weight is divided by its size and each second moment by its mean diagonal, so that a layer
    counts by its relative error. Scales are relative to the size of all, so that the codebook is as large as weights.
    With `weighting` "diagonal" a sub-vector counts by the mean square of its input. `damping` and
    `shrinkage` of second moments are as `along_outputs.damped` says.
    """

    def __init__(
        self,
        names: Sequence[str],
        layers: list[Layer],
        recipe: Recipe,
        generator: torch.Generator,
        *,
        axis: Axis,
        weighting: Literal["none", "diagonal"],
        damping: float,
        shrinkage: float,
    ) -> None:
        self.names, self._layers, self.recipe = names, layers, recipe
        self._axis, self._weighting, self._damped = axis, weighting, (damping, shrinkage)
        self.weights = [layer.weight_OI.float() for layer in layers]
        if axis == "out":  # input by input in memory, as they are cut
            self.weights = [weight_OI.T.contiguous().T for weight_OI in self.weights]
        self.matrices = [(layer.weight_OI.shape[0], layer.weight_OI.shape[1]) for layer in layers]
        self.numbers = sum(weight.numel() for weight in self.weights)
        self.worth = sum(layer.worth for layer in layers)
        self.generator = generator
        self.scales: list[float | None] = [None]
        if len(layers) > 1:
            squares = [float(weight.square().mean()) for weight in self.weights]
            mean = sum(square * weight.numel() for square, weight in zip(squares, self.weights)) / self.numbers
            scales = [(square / (mean or 1.0)) ** 0.5 for square in squares]
            self.weights = [weight / (scale or 1.0) for weight, scale in zip(self.weights, scales)]
            self.scales = [*scales]

    def points(self, vector_dim: int) -> tuple[Tensor, Tensor | None]:
        """The sub-vectors (N, D) of all layers and what each counts, (N,), or None."""
        points = [sub_vectors(weight, vector_dim, self._axis) for weight in self.weights]
        if self._weighting == "none":
            return _joined(points), None
        counts = []
        for layer, (out_features, in_features) in zip(self._layers, self.matrices):
            diagonal_I = layer.show().diagonal_I
            if not bool(diagonal_I.any()):  # no input was ever seen: all count alike, as in `damped`
                diagonal_I = torch.ones_like(diagonal_I)
            vectors = num_sub_vectors(out_features, in_features, vector_dim, self._axis)
            counts.append((diagonal_I / self._mean(diagonal_I)).repeat_interleave(vectors // in_features))
        return _joined(points), _joined(counts)

    @property
    def alike(self) -> tuple[Any, ...]:
        """What decides, beside numbers, what becomes of it: groups of which it is equal are alike."""
        inputs = tuple(layer.input for layer in self._layers)
        together = tuple(inputs.index(one) for one in inputs)
        return tuple(self.matrices), together, self.recipe, self._axis, self._weighting, self._damped

    @property
    def energy(self) -> float:
        """The mean square of the weights, weighted as K-means weights them."""
        points_ND, weights_N = self.points(1)
        squares_N = points_ND.square().sum(1)
        return float((squares_N if weights_N is None else squares_N * weights_N).mean()) or 1.0

    def best(self, shapes: list[Shape], effort: Effort | None) -> Shape:
        """The best of some shapes of the codebook: by errors measured on the weights, or as for Gaussian ones."""
        if effort is None:
            return max(shapes, key=expected_bits)
        return choose(self.points, shapes, self.recipe, self.generator, effort)

    def stored(
        self,
        shape: Shape,
        storage: Storage,
        *,
        assign: Literal["nearest", "hessian"],
        least_squares: int,
        descent: int,
    ) -> list[CodebookWeight]:
        """The stored forms of the layers, with one codebook.

        It is that of K-means. With any of `assign` "hessian", `least_squares` and `descent`, which need axis "out",
        codes and codebook are then chosen by what the layers' outputs lose: see `along_outputs`.
        """

        def make() -> list[CodebookWeight]:
            found = self._kmeans(shape)
            counts = [num_sub_vectors(*matrix, shape.vector_dim, self._axis) for matrix in self.matrices]
            codes, centroids_KD = list(found.codes_N.split(counts)), found.centroids_KD
            if assign == "hessian" or least_squares or descent:
                hessian = assign == "hessian"
                codes, centroids_KD = self._by_output(codes, centroids_KD, storage, hessian, least_squares, descent)
            stored = [
                CodebookWeight.from_codes(
                    codes_N[None],
                    centroids_KD[None],
                    None if scale is None else torch.tensor([scale], device=codes_N.device),
                    out_features=out_features,
                    in_features=in_features,
                    axis=self._axis,
                    storage=storage,
                )
                for codes_N, scale, (out_features, in_features) in zip(codes, self.scales, self.matrices)
            ]
            for weight in stored[1:]:
                weight.follow(stored[0])
            return stored

        return once(("stored", self.alike, shape, storage, assign, least_squares, descent), self.weights[0], make)

    def _kmeans(self, shape: Shape) -> Clustering:
        """Centroids and codes of all sub-vectors, which leave memory."""
        points_ND, weights_N = self.points(shape.vector_dim)
        return kmeans(points_ND, shape.codebook_size, self.recipe, self.generator, weights_N)

    def _by_output(
        self,
        codes: list[Tensor],
        centroids_KD: Tensor,
        storage: Storage,
        hessian: bool,
        least_squares: int,
        descent: int,
    ) -> tuple[list[Tensor], Tensor]:
        """Codes (N,) and centroids (K, D) chosen by the error of the layers' outputs."""
        weights = [weight_OI.T.contiguous() for weight_OI in self.weights]
        bits = code_bits(len(centroids_KD))
        coded = [codes_N.view(len(weight_IO), -1) for codes_N, weight_IO in zip(codes, weights)]
        for number in range(descent + 1):
            stored_KD = centroid_values(centroids_KD[None], storage)[0]
            if number:
                coded = [
                    descend_codes(weight_IO, codes_IG, stored_KD, moment_II)
                    for weight_IO, codes_IG, moment_II in zip(weights, coded, self._moments())
                ]
            elif hessian:
                coded = [
                    feedback_codes(weight_IO, stored_KD, self._moment(layer))  # which takes it out of memory
                    for weight_IO, layer in zip(weights, self._layers)
                ]
            if least_squares:
                packed = [pack(codes_IG.flatten(), bits) for codes_IG in coded]
                layers = [Coded(*layer) for layer in zip(weights, packed, self._moments())]
                centroids_KD = least_squares_codebook(layers, bits, centroids_KD, least_squares, ENOUGH)
        return [codes_IG.flatten() for codes_IG in coded], centroids_KD

    def _moments(self) -> list[Tensor]:
        """The damped second moment (I, I) of each layer's inputs, one for layers with one input."""
        made = {layer.input: self._moment(layer) for layer in {layer.input: layer for layer in self._layers}.values()}
        return [made[layer.input] for layer in self._layers]

    def _moment(self, layer: Layer) -> Tensor:
        """The damped second moment (I, I) of a layer's inputs."""
        found_II = damped(layer.show().matrix_II, *self._damped)
        if len(self._layers) > 1:
            found_II /= self._mean(found_II.diagonal())
        return found_II

    def _mean(self, diagonal_I: Tensor) -> float:
        return float(diagonal_I.mean()) or 1.0 if len(self._layers) > 1 else 1.0


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
