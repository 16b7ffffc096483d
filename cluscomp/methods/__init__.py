"""HOW a weight is compressed: the Method protocol. One file a method; methods do not import each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from cluscomp.solve.layer import Layer, Place

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cluscomp.kernels.work import Work
    from cluscomp.solve.layer import SecondMoment


@runtime_checkable
class Method(Protocol):
    """A way to compress one weight: a frozen settings class that sees tensors only, no model, path or global seed."""

    @property
    def exact(self) -> bool:
        """Whether `outline` is what `compress` will store; otherwise the likeliest form."""
        ...

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ValueError, without the layer's name, if the settings cannot work for a weight of this shape."""
        ...

    def outline(self, out_features: int, in_features: int) -> "nn.Module":
        """The stored form of a weight of this shape, empty, on the default device, for the planner; see `exact`."""
        ...

    def work(self, out_features: int, in_features: int) -> "Work":
        """About how much `compress` will do for a weight of this shape."""
        ...

    def scratch(self, out_features: int, in_features: int) -> float:
        """Bytes that `compress` will hold at most beside the weight in float32 and the statistic."""
        ...

    def statistic(self) -> "SecondMoment | None":
        """A fresh accumulator of what the method wants to know of a layer's inputs; None: it needs no data."""
        ...

    def compress(
        self, weight_OI: "Tensor", statistic: "SecondMoment | None", generator: "torch.Generator"
    ) -> "nn.Module":
        """Turn a finite dense weight (O, I) into a stored form (see `cluscomp.forms.stored.Stored`).

        `statistic` is what `statistic()` gave, having seen the layer's inputs. The result depends on the weight, the
        statistic, the settings and the generator's seed alone. Raises ValueError as `check`.
        """
        ...


@runtime_checkable
class ByLayer(Method, Protocol):
    """A method whose settings differ from layer to layer of a block, to spend what all layers together may take."""

    def by_layer(self, matrices: dict[str, tuple[int, int]]) -> dict[str, Method]:
        """The method with the settings for each layer (O, I) of a block, by name; asked for in its place."""
        ...


@dataclass(frozen=True)
class Compressed:
    """The stored forms of some layers of a block by name, and what was chosen for them, as plain values."""

    stored: "dict[str, nn.Module]"
    chosen: dict[str, Any]


@runtime_checkable
class BlockMethod(Method, Protocol):
    """A method that is given the layers of a block at once, by name, to share or trade bits between them.

    Each function is that of `Method` for a block, and is called in its place; errors begin with the layers' names.
    """

    def check_block(self, places: dict[str, Place]) -> None:
        """As `Method.check`, for all layers of a block."""
        ...

    def outline_block(self, places: dict[str, Place]) -> "dict[str, nn.Module]":
        """As `Method.outline`: the empty stored form of each layer."""
        ...

    def work_block(self, places: dict[str, Place]) -> "Work":
        """As `Method.work`, for all layers of a block."""
        ...

    def scratch_block(self, places: dict[str, Place]) -> float:
        """As `Method.scratch`, at the worst moment of a block."""
        ...

    def compress_block(self, layers: dict[str, Layer]) -> Iterator[Compressed]:
        """As `Method.compress`, some layers at a time; those that were given back are not looked at again."""
        ...
