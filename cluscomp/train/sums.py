"""Losses and gradients of the parts of a batch, added up so that it does not matter which process computed which."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluscomp import ranks


class Sums:
    """The sum of a batch's parts: of their losses, and of the gradients that each leaves in the float32 `parameters`.

    Numbers of float32 are added in float64, where the sum is exact unless one is millions of times as large as another;
    so it is the same in whichever order, and by whichever number of processes. It is rounded once, at the end.
    A part has to be computed alone: what a matrix product gives depends on the rows beside.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._begin()

    def _begin(self) -> None:
        self._gradients: list[Tensor | None] = [None] * len(self._parameters)
        self._loss = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)

    def add(self, loss: Tensor) -> None:
        """Take the gradients of one more part, whose loss () this is, from the parameters."""
        self._loss += loss.detach()
        for number, parameter in enumerate(self._parameters):
            new, parameter.grad = parameter.grad, None
            if new is not None:
                before = self._gradients[number]
                self._gradients[number] = new if before is None else before.double().add_(new)

    def total(self) -> Tensor:
        """Give the parameters the sums over all processes as gradients; returns that of the losses, () float64.

        It begins anew then. A parameter that got a gradient from no part has none.
        """
        found = ranks.added(self._gradients, self._parameters)
        for parameter, gradient in zip(self._parameters, found):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        loss = ranks.summed(self._loss)
        self._begin()
        return loss
