"""Length and size of codebooks along the inputs for a limit of stored bits; torch is not needed to check settings."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cluscomp.errors import named
from cluscomp.methods import Compressed
from cluscomp.methods.on_grids import check_choice
from cluscomp.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cluscomp.forms.codebook import CodebookWeight
    from cluscomp.solve.allocate import Menu
    from cluscomp.solve.layer import Layer, Seen
    from cluscomp.solve.shapes import Matrices, Shape


@settings
class InputCodebooks(ABC):
    """Settings that methods with codebooks along the inputs share, and what follows from them.

    Either `bits` is given, the most bits per weight that may be stored, and length D and size K of the codebooks are
    chosen for each matrix, the best for Gaussian weights; or `vector_dim` (D) and `codebook_size` (K) are fixed by
    hand. `allocation` "uniform" gives every matrix at most `bits` (as K beyond a power of two costs a bit a code, what
    is stored lies up to 0.5 below the limit); "fill" spends them, with `bits` as the most of a block. `storage` is the
    type of the codebooks' values. A method says how many codebooks it adds (`added`).
    """

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
    def stored(
        self, weight_OI: "Tensor", seen: "Seen", generator: "torch.Generator", shape: "Shape"
    ) -> "CodebookWeight":
        """The stored form of a weight (O, I) in float32, with codebooks of this shape. Raises ValueError, no name."""

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """See `Method.compress`."""
        shapes = self.shapes({name: _matrix(layer) for name, layer in layers.items()})
        for name, shape in shapes.items():
            layer = layers[name]
            with named([name]):
                stored = self.stored(layer.weight_OI.float(), layer.show(), layer.generator, shape)
            yield Compressed({name: stored}, {})

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """By shapes alone; see `methods.Offers`."""
        for name, layer in layers.items():
            yield self._menu(name, _matrix(layer))

    def shapes(self, matrices: "dict[str, tuple[int, int]]") -> "dict[str, Shape]":
        """The shape of the codebooks of each layer (O, I) of a block, by name. Raises ValueError, beginning with it."""
        from cluscomp.solve.allocate import share_out

        if self.allocation == "fill" and self.bits is not None:
            picked = share_out([self._menu(name, matrix) for name, matrix in matrices.items()], self.bits)
            methods = [replace(self, **option.settings) for option in picked]
        else:
            methods = [self] * len(matrices)
        found = {}
        for method, (name, matrix) in zip(methods, matrices.items()):
            with named([name]):
                found[name] = method.shape(*matrix)
        return found

    def _menu(self, name: str, matrix: "tuple[int, int]") -> "Menu":
        from cluscomp.solve.allocate import expected_menu

        assert self.bits is not None  # who asks for offers has looked
        return expected_menu([name], [matrix], self._best, self.bits, self._quality)

    def shape(self, out_features: int, in_features: int) -> "Shape":
        """Length D and size K of each codebook for a weight (O, I): by hand, or the best within `bits` for all of them.

        With the bits per weight that all of them take. Raises ValueError if none fits, or K exceeds the number of
        sub-vectors.
        """
        from cluscomp.forms.codebook import num_sub_vectors
        from cluscomp.solve.shapes import Shape

        matrices = [(out_features, in_features)]
        if self.bits is None:
            assert self.vector_dim is not None and self.codebook_size is not None  # check_choice
            vectors = num_sub_vectors(out_features, in_features, self.vector_dim, "in")
            if self.codebook_size > vectors:
                raise ValueError(
                    f"method.codebook_size={self.codebook_size} exceeds the {vectors} sub-vectors of length "
                    f"{self.vector_dim} in a {out_features} x {in_features} matrix; take fewer, or give bits=3 instead"
                )
            by_hand = Shape.of(matrices, "in", self.vector_dim, self.codebook_size, self.storage)
            return replace(by_hand, bits=self.added * by_hand.bits)
        return self._best(matrices, self.bits)[0]

    def _best(self, matrices: "Matrices", bits: float) -> "list[Shape]":
        """The one best shape within `bits` a weight for all codebooks."""
        from cluscomp.solve.shapes import reachable

        try:
            shapes = reachable(matrices, "in", bits / self.added, self.storage)
        except ValueError as error:
            raise ValueError(f"{error} (each of {self.added} codebooks has its share of bits={bits})") from error
        best = max(shapes, key=self._quality)
        return [replace(best, bits=self.added * best.bits)]

    def _quality(self, shape: "Shape") -> float:
        """As `cluscomp.solve.shapes.expected_bits`; every further codebook adds what its codes take."""
        from cluscomp.solve.shapes import expected_bits

        return expected_bits(shape) + (self.added - 1) * math.log2(shape.codebook_size) / shape.vector_dim


def _matrix(layer: "Layer") -> tuple[int, int]:
    return layer.weight_OI.shape[0], layer.weight_OI.shape[1]
