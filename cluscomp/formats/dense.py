"""An ordinary dense model, as transformers writes it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.forms.layers import size_of
from cluscomp.models.original import Original


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write the model with the weights that its layers rebuild, in the dtype that it computes in."""
    bits, dtype = size_of(model).linear_bits_per_weight, model.dtype
    model.dequantize()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lost = [f"size: {bits:.2f} bits per weight of the linear layers become {8 * dtype.itemsize}"]
    return lost if dtype == torch.float32 else [*lost, f"exactness: weights are rounded to {str(dtype)[6:]}"]


def read_back(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weight (O, I), as transformers finds it by its own names for it; without those it does not find."""
    original = Original(folder, torch.float32, torch.device("cpu"))
    weights = [f"{name}.weight" for name in names if original.has(f"{name}.weight")]
    for weight, tensor_OI in original.tensors(weights):
        yield weight.removesuffix(".weight"), tensor_OI.to(original.file_dtype(weight))
