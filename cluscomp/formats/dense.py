"""An ordinary dense model, as transformers writes it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.formats import folder as folders
from cluscomp.forms.layers import size_of


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write the model with the weights that its layers rebuild, in the dtype that it computes in."""
    bits, dtype = size_of(model).linear_bits_per_weight, model.dtype
    model.dequantize()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lost = [f"size: {bits:.2f} bits per weight of the linear layers become {8 * dtype.itemsize}"]
    return lost if dtype == torch.float32 else [*lost, f"exactness: weights are rounded to {str(dtype)[6:]}"]


def read_back(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weight (O, I) in the files."""
    for name, parts in folders.read(folder, names):
        yield name, parts["weight"]
