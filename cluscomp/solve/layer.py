"""A layer as methods see it: weight, second moment of its inputs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a weight (O, I) stands in its block: layers of a block with the same `input` read the same tensor."""

    out_features: int
    in_features: int
    input: int


@dataclass(frozen=True)
class Layer:
    """A finite dense weight (O, I) of a block with its place, the statistic of its inputs and its own generator."""

    place: Place
    weight_OI: "Tensor"
    statistic: "SecondMoment | None"
    generator: "torch.Generator"


class SecondMoment:
    """Accumulates the second moment H = X^T X / tokens of a layer's inputs, or its diagonal alone (`full` false).

    With it goes the mean size of each input, over the same tokens.

    Sums are float32 on the inputs' device: (I, I) x 4 bytes, 1.2 GB for the widest layer of a 70B model, so one of a
    block is kept at a time where layers do not share their input.
    """

    def __init__(self, *, full: bool) -> None:
        self.full, self.tokens = full, 0
        self._sum: Tensor | None = None
        self._sizes: Tensor | None = None

    def add(self, x: Float[Tensor, "*batch I"]) -> None:
        """Take in the inputs of some more tokens: (..., I)."""
        x_TI = x.detach().reshape(-1, x.shape[-1]).float()
        new = x_TI.T @ x_TI if self.full else x_TI.square().sum(0)
        sizes = torch.linalg.vector_norm(x_TI, 1, dim=0)
        self._sum = new if self._sum is None else self._sum.add_(new)
        self._sizes = sizes if self._sizes is None else self._sizes.add_(sizes)
        self.tokens += len(x_TI)

    @property
    def matrix_II(self) -> Float[Tensor, "I I"]:
        """H, (I, I). Raises ValueError if only the diagonal was asked for, and as `diagonal_I` does."""
        if not self.full:
            raise ValueError("only the diagonal of this second moment was accumulated")
        return self._mean(self._seen())

    @property
    def diagonal_I(self) -> Float[Tensor, " I"]:
        """Mean square of each input, (I,). Raises ValueError if no token was seen, or it is not finite."""
        return self._mean(self._seen().diagonal() if self.full else self._seen())

    @property
    def magnitude_I(self) -> Float[Tensor, " I"]:
        """Mean absolute value of each input, (I,). Raises ValueError as `diagonal_I`."""
        self._seen()
        assert self._sizes is not None  # as is the sum
        return self._mean(self._sizes)

    def _seen(self) -> Tensor:
        if self._sum is None:
            raise ValueError("no calibration token reached this layer")
        return self._sum

    def _mean(self, total: Tensor) -> Tensor:
        if not bool(total.isfinite().all()):
            raise ValueError("its inputs on the calibration text have NaN or infinity: the original model overflows")
        return total / self.tokens
