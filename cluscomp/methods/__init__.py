"""HOW a weight is compressed: the Method protocol. One file a method; methods do not import each other."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@runtime_checkable
class Method(Protocol):
    """A way to compress one weight: a frozen settings class that sees tensors only, no model, path or global seed."""

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ValueError, without the layer's name, if the settings cannot work for a weight of this shape."""
        ...

    def compress(self, weight_OI: "Tensor", generator: "torch.Generator") -> "nn.Module":
        """Turn a finite dense weight (O, I) into a stored form (see `cluscomp.weights.Weight`).

        The result depends on the weight, the settings and the generator's seed alone. Raises ValueError as `check`.
        """
        ...
