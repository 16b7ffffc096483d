"""Products of a few rows with a dense weight of 16-bit numbers, whose reading is what takes the time."""

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.kernels.codebook import as_array
from cluscomp.kernels.loading import native, number_of_threads

MOST_ROWS = 8  # of x: as many as codebooks take; the logits of more tokens are those of a dense model to the bit


def multiply(x_BI: Float[Tensor, "B I"], weight_OI: Float[Tensor, "O I"], *, threads: int | None = None) -> Tensor:
    """y_BO = x_BI @ weight_OI.T in float32, of x in float32 and a weight in bfloat16 or float16, on the CPU.

    A row's sums are the same whatever the other rows and the number of threads are.

    Raises:
        ValueError: sizes or types that do not agree.
    """
    if x_BI.dtype != torch.float32 or weight_OI.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x_BI.dtype} and the weight {weight_OI.dtype}; float32 and 16 bits are needed")
    if x_BI.shape[1] != weight_OI.shape[1]:
        raise ValueError(f"x has {x_BI.shape[1]} inputs, the weight {weight_OI.shape[1]}")
    if native is None:
        return multiply_reference(x_BI, weight_OI)
    y_BO = torch.empty(len(x_BI), len(weight_OI))
    arrays = as_array(weight_OI.contiguous()), as_array(x_BI.detach().contiguous()), as_array(y_BO)
    native.multiply_halves(*arrays, number_of_threads(threads))
    return y_BO


def multiply_reference(x_BI: Float[Tensor, "B I"], weight_OI: Float[Tensor, "O I"]) -> Tensor:
    """The same in plain torch: (B, I) and (O, I) -> (B, O)."""
    return x_BI @ weight_OI.float().T
