"""How a weight is STORED: the Weight protocol. One file a form."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Weight(Protocol):
    """A stored form of a weight, a module. The constructor takes what is stored, so loading is `Class(**stored)`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What can be trained."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        ...

    def __call__(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (out features, in features) in `dtype`, differentiable in the module's parameters.

        `inputs`: only the columns of one of `tiles()`.
        """
        ...

    def tiles(self) -> list[slice]:
        """Ranges of inputs, together all, to be rebuilt one after the other; a single one where that is as well."""
        ...

    def product(self, x_BI: Float[Tensor, "B I"]) -> Float[Tensor, "B O"] | None:
        """x W^T for a few tokens without the dense weight, (B, I) -> (B, O), or None where there is no faster way."""
        ...

    def loosen(self) -> None:
        """Make float32 masters of the parameters, to be trained."""
        ...

    def settle(self) -> None:
        """Round trained masters to what is stored. Raises ValueError if they are not finite or do not fit."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict()` gave before `loosen`."""
        ...

    def ledger(self) -> dict[str, int]:
        """Stored bits by part (codes, codebooks, padding, ...), without what another weight stores."""
        ...

    def paper_bits(self) -> int:
        """Bits as the paper's Equation 3 counts them: 16 for each code, no padding; without codes those stored."""
        ...

    def spec(self) -> dict[str, Any]:
        """Plain values from which `empty(**spec)` makes a module of the same shapes."""
        ...
