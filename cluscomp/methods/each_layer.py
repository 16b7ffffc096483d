"""Methods that work layer by layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from cluscomp import solve
from cluscomp.errors import named
from cluscomp.methods import Compressed

if TYPE_CHECKING:  # torch is not needed to check settings
    import torch
    from torch import Tensor

    from cluscomp.forms.stored import Stored
    from cluscomp.solve.layer import Layer, Seen

Known = TypeVar("Known")


class EachLayer(ABC):
    """A method that works layer by layer."""

    @abstractmethod
    def stored(self, weight_OI: "Tensor", seen: "Seen | None", generator: "torch.Generator") -> "Stored":
        """The stored form of a weight (O, I) in float32. Raises ValueError, without a name, if it cannot be.

        `seen` is there if `sees` names something.
        """

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Layer after layer; see `Method.compress`."""
        for name in list(layers):
            layer = layers[name]
            with named([name]):
                stored = self.stored(layer.weight_OI.float(), layer.seen, layer.generator)
            yield Compressed({name: stored}, {})


def with_moments(
    layers: "dict[str, Layer]", damping: float, known: "Callable[[Tensor], Known]"
) -> "Iterator[tuple[str, Known]]":
    """One layer after the other, with what is `known` of its inputs by their damped second moment (I, I).

    Neighbours that read one input share it. What is shown of a layer is looked at when it is its turn.
    """
    last = None
    for name in list(layers):
        layer = layers[name]
        if last is None or last[0] is not layer.seen:
            with named([name]):
                last = layer.seen, known(solve.along_outputs.damped(layer.show().matrix_II, damping))
        yield name, last[1]
