"""A dense model written block by block as an ordinary Hugging Face folder, which `Original` reads again."""

import json
import shutil
from collections.abc import Iterable
from copy import deepcopy
from functools import reduce
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cluscomp import checkpoint
from cluscomp.forms.linear import storage_dtype, unique_tensors
from cluscomp.forms.multimodal import copy_processor
from cluscomp.models.original import GENERATION, Original, block_names
from cluscomp.store.files import new_folder


def save(model: PreTrainedModel, blocks: Iterable[dict[str, Tensor]], original: Original, folder: Path) -> None:
    """Write a dense model with hashes; the folder appears whole or not at all.

    Args:
        model: has everything but the blocks in memory.
        blocks: the tensors of each block, by their name in it; one block is in memory at a time.
        original: what the model was made of; numbers are written in the dtype they have in its file, or, where that
            does not hold them exactly, in the narrowest that does. Config, tokenizer and generation config are its.
        folder: where to.

    Raises OSError if the place cannot be written.
    """
    names = block_names(model)
    inside = tuple(f"{name}." for name in names)
    outside = {name: tensor for name, tensor in unique_tensors(model).items() if not name.startswith(inside)}
    parts = (
        original.as_in_transformers({f"{name}.{key}": tensor for key, tensor in block.items()})
        for name, block in zip(names, blocks)
    )
    places: dict[str, str] = {}
    dtypes: set[torch.dtype] = set()
    size = 0
    with new_folder(folder) as unfinished:
        for number, tensors in enumerate(chain([outside], parts), 1):
            file = f"model-{number:05}-of-{len(names) + 1:05}.safetensors"
            stored = {name: _stored(tensor, original.file_dtype(name)) for name, tensor in tensors.items()}
            save_file(stored, unfinished / file, metadata={"format": "pt"})
            places |= dict.fromkeys(stored, file)
            dtypes |= {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
            size += sum(tensor.nbytes for tensor in stored.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        config = deepcopy(model.config)
        config.dtype = reduce(torch.promote_types, dtypes)
        config.save_pretrained(unfinished)
        original.tokenizer.save_pretrained(unfinished)
        copy_processor(original.folder, unfinished)
        if (original.folder / GENERATION).is_file():
            shutil.copyfile(original.folder / GENERATION, unfinished / GENERATION)
        checkpoint.seal(unfinished)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in this dtype, or, where that does not hold it exactly, in the narrowest that does."""
    held = torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
    return tensor.detach().to(dtype if held else storage_dtype(tensor)).contiguous()
