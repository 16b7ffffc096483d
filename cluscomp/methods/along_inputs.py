"""Length and size of codebooks along one axis for a limit of stored bits; torch is not needed to check settings."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from cluscomp import solve
from cluscomp.errors import named
from cluscomp.methods import Compressed
from cluscomp.methods.on_grids import check_choice
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.stored import Stored
    from cluscomp.solve.allocate import Menu
    from cluscomp.solve.layer import Layer, Seen
    from cluscomp.solve.shapes import Matrices, Shape


@settings
class InputCodebooks(ABC):
    """Settings that methods with codebooks chosen by shapes alone share, and what follows from them.

    Either `bits` is given, the most bits per weight that may be stored, and length D and size K of the codebooks are
    chosen for each matrix, the best for Gaussian weights; or `vector_dim` (D) and `codebook_size` (K) are fixed by
    hand. `allocation` "uniform" gives every matrix at most `bits` (as K beyond a power of two costs a bit a code, what
    is stored lies up to 0.5 below the limit); "fill" spends them, with `bits` as the most of a block. `storage` is the
    type of the codebooks' values. A method says along which `axis` its sub-vectors lie, and how many codebooks of one
    size it adds (`added`).
    """

    axis: ClassVar[Literal["out", "in"]] = "in"
    bits: float | None = Field(ge=1, le=8)
    vector_dim: int | None = Field(ge=1, le=64)
    codebook_size: int | None = Field(ge=2, le=65_536)
    allocation: Literal["uniform", "fill"]
    storage: Literal["float16", "float8", "int8"]

    @model_validator(mode="after")
    def _either_bits_or_shape(self) -> "InputCodebooks":
        check_choice(self.bits, vector_dim=self.vector_dim, codebook_size=self.codebook_size)
        return self

    @property
    def added(self) -> int:
        """M, the codebooks whose centroids are added."""
        return 1

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs."""
        return frozenset({"moment"})

    @abstractmethod
    def stored(self, weight_OI: "Tensor", seen: "Seen", generator: "torch.Generator", shape: "Shape") -> "Stored":
        """The stored form of a weight (O, I) in float32, with codebooks of this shape. Raises ValueError, no name."""

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Layer after layer; see `Method.compress`."""
        methods = [self] * len(layers)
        if self.allocation == "fill" and self.bits is not None:
            methods = [
                replace(self, **option.settings)
                for option in solve.allocate.share_out([*self.offers(layers)], self.bits)
            ]
        shapes = {}
        for method, (name, layer) in zip(methods, layers.items()):
            with named([name]):
                shapes[name] = method.shape(*_matrix(layer))
        for name, shape in shapes.items():
            layer = layers[name]
            with named([name]):
                stored = self.stored(layer.weight_OI.float(), layer.show(), layer.generator, shape)
            yield Compressed({name: stored}, {})

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """By shapes alone; see `methods.Offers`."""
        assert self.bits is not None  # who asks for offers has looked
        for name, layer in layers.items():
            yield solve.allocate.expected_menu(
                [name], [_matrix(layer)], self.shapes, self.bits, layer.worth, self.quality
            )

    def shape(self, out_features: int, in_features: int) -> "Shape":
        """Length D and size K of each codebook for a weight (O, I): by hand, or the best within `bits` for all of them.

        With the bits per weight that all of them take. Raises ValueError if none fits, or K exceeds the number of
        sub-vectors.
        """
        matrices = [(out_features, in_features)]
        if self.bits is not None:
            return max(self.shapes(matrices, self.bits), key=self.quality)
        assert self.vector_dim is not None and self.codebook_size is not None  # check_choice
        return self.with_all(
            matrices, solve.shapes.fixed(matrices, self.axis, self.vector_dim, self.codebook_size, self.storage)
        )

    def shapes(self, matrices: "Matrices", bits: float) -> "list[Shape]":
        """What may be chosen from for matrices (O, I), with the bits per weight of all codebooks together.

        Raises ValueError if none fits.
        """
        return [solve.shapes.best_of_sum(matrices, self.axis, bits, self.storage, self.added)]

    def with_all(self, matrices: "Matrices", shape: "Shape") -> "Shape":
        """A codebook's shape with the bits per weight of all codebooks of matrices (O, I)."""
        return replace(shape, bits=self.added * shape.bits)

    def quality(self, shape: "Shape") -> float:
        """What codebooks of this shape are worth, in bits; see `shapes.expected_bits`."""
        return solve.shapes.expected_bits(shape, self.added)


def _matrix(layer: "Layer") -> tuple[int, int]:
    return layer.weight_OI.shape[0], layer.weight_OI.shape[1]
