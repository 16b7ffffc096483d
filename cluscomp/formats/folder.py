"""What formats that are Hugging Face folders with another quantizer's layers share."""

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.errors import InputError
from cluscomp.forms.linear import compressed, unique_tensors
from cluscomp.forms.stored import Stored
from cluscomp.forms.uniform import UniformWeight
from cluscomp.kernels.codes import pack


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    layers: dict[str, dict[str, Tensor]],
    quantization_config: dict[str, Any],
) -> list[str]:
    """Write a folder with these tensors of each compressed layer, all others in float16, and tokenizer.

    Returns what is lost in each such format.
    """
    tensors = {name: _in_float16(name, tensor) for name, tensor in others(model).items()}
    tensors |= {f"{name}.{key}": tensor for name, parts in layers.items() for key, tensor in parts.items()}
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_torch_state_dict(whole, folder)  # it refuses a tensor that is a part of another's storage
    config = deepcopy(model.config)
    config.dtype = torch.float16
    config.quantization_config = quantization_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ["dtype: what is not compressed is in float16, and so are products"]


def read(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each of these layers in a folder's files, layer after layer, by their names within it."""
    places: dict[str, dict[str, Path]] = {name: {} for name in names}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                ends = [at for at, letter in enumerate(key) if letter == "."]
                layer = next((key[:at] for at in ends if key[:at] in places), None)
                if layer is not None:
                    places[layer][key[len(layer) + 1 :]] = path
    for name, parts in places.items():
        tensors: dict[str, Tensor] = {}
        for part, path in parts.items():
            with safe_open(path, "pt") as file:
                tensors[part] = file.get_tensor(f"{name}.{part}")
        yield name, tensors


def quantization_of(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder's config.json."""
    said: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return said


def others(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model outside of the weights of its compressed layers, tied ones once."""
    own = tuple(f"{name}.{part}" for name in compressed(model) for part in ("stored.", "weight"))
    return {name: tensor for name, tensor in unique_tensors(model).items() if not name.startswith(own)}


def _in_float16(name: str, tensor: Tensor) -> Tensor:
    """A tensor in float16. Raises InputError for one that does not fit."""
    found = tensor.detach().to(torch.float16) if tensor.is_floating_point() else tensor.detach()
    if not bool(found.isfinite().all()):
        raise InputError(f"{name}: has numbers beyond 65504, which float16 cannot hold; format=dense can")
    return found


def dense_linears(model: nn.Module) -> list[str]:
    """The names of linear layers that are not compressed (the head)."""
    inside = compressed(model)
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name not in inside]


def refused(name: str, form: Stored, format: str, holds: str) -> InputError:
    """The refusal of a layer in a form that a format cannot hold."""
    shape = ", ".join(f"{key}={value}" for key, value in form.spec().items() if isinstance(value, int | str))
    return InputError(f"{name}: format={format} holds {holds}; this is {form.kind} ({shape}); format=dense holds all")


def grids(model: nn.Module, format: str) -> dict[str, UniformWeight]:
    """The weights on uniform grids of all compressed layers, by name.

    Raises InputError for a layer in another form, or with zeros that are no whole numbers, groups of unequal sizes or
    scales of inputs.
    """
    found: dict[str, UniformWeight] = {}
    for name, layer in compressed(model).items():
        form = layer.stored
        whole = isinstance(form, UniformWeight) and form.kind_of_zeros != "float16" and form.width > 1
        if not whole or form.inputs is not None or form.in_features % form.groups:
            raise refused(
                name,
                form,
                format,
                "numbers of 2 to 8 bits on grids with whole zeros and groups of equal size, "
                "as bits=null method.width=4 method.group=64 gives",
            )
        found[name] = form
    return found


def the_same(format: str, found: Mapping[str, tuple[int, ...]], what: str) -> tuple[int, ...]:
    """What all layers have in common. Raises InputError, naming two of them, if they differ; `what` says in what."""
    (first, one), *_ = found.items()
    for name, other in found.items():
        if other != one:
            raise InputError(
                f"{name}: {what} {other}, and those of {first} are {one}; format={format} has one for the whole model"
            )
    return one


def words(codes_RC: Int[Tensor, "R C"], bits: int) -> Int[Tensor, "R W"]:
    """Each row's codes as a little-endian stream of 32-bit words: (R, C) -> (R, ceil(C * bits / 32)) int32."""
    rows, count = codes_RC.shape
    packed = pack(F.pad(codes_RC, (0, -count % 32)).flatten(), bits)
    return packed.view(torch.int32).view(rows, -1)[:, : -(-count * bits // 32)].contiguous()
