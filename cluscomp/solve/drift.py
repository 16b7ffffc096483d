"""Weights corrected for what compressed blocks before them do to their inputs (QEP, GPTAQ, Qronos, WaterSIC).

A layer of weight W gets inputs x in the original and y behind compressed blocks. |W x - V y| is least for V = W + W D
(H + l I)^-1 with D = mean (x - y) y^T, H = mean y y^T. D has I^2 numbers and is fitted on little text, so it is damped
by l and followed only a part of the way.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Drift:
    """What the inputs of a layer are off the original's, gathered over tokens."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    def add(self, y_TI: Float[Tensor, "T I"], original_TI: Float[Tensor, "T I"]) -> None:
        """Take in the inputs (T, I) of some more tokens, and what they are in the original."""
        new_II = (original_TI - y_TI).T @ y_TI
        self._total = new_II if self._total is None else self._total.add_(new_II)
        self._tokens += len(y_TI)

    @property
    def nbytes(self) -> int:
        """Bytes that the sum takes."""
        return 0 if self._total is None else self._total.nbytes

    def correction(self, moment_II: Float[Tensor, "I I"], damping: float) -> Float[Tensor, "I I"]:
        """D (H + l I)^-1, (I, I); l is `damping` times H's mean diagonal."""
        assert self._total is not None  # made when the first tokens are there
        damped_II = moment_II.double()  # a copy: moments are float32
        damped_II.diagonal().add_(damping * damped_II.diagonal().mean() + 1e-12)
        drift_II = self._total.double() / self._tokens
        found_II: Tensor = torch.linalg.solve(damped_II, drift_II, left=False)
        return found_II.to(moment_II.dtype)


def corrected(
    weight_OI: Float[Tensor, "O I"], correction_II: Float[Tensor, "I I"], strength: float
) -> Float[Tensor, "O I"]:
    """W + strength W D (H + l I)^-1, (O, I), in the weight's dtype."""
    return (weight_OI.float() + strength * (weight_OI.float() @ correction_II)).to(weight_OI.dtype)
