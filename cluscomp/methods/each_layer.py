"""Methods that work layer by layer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluscomp.errors import named
from cluscomp.methods import Compressed

if TYPE_CHECKING:  # torch is not needed to check settings
    import torch
    from torch import Tensor

    from cluscomp.forms.stored import Stored
    from cluscomp.solve.layer import Layer, Seen


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
