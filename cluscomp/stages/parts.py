"""One block of a model in a file: what survives a killed stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluscomp.checkpoint import stored_state
from cluscomp.forms.layers import build_all, place, put_in, specs
from cluscomp.forms.stored import Stored
from cluscomp.store.tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class Part:
    """What `save_part` wrote of a block: its compressed layers, its other tensors, and plain numbers."""

    layers: dict[str, Stored]
    others: dict[str, torch.Tensor]
    numbers: dict[str, Any]


def save_part(path: Path, block: nn.Module, numbers: dict[str, Any]) -> None:
    """Write one block, and plain numbers beside it: what survives a killed stage."""
    write_tensors(path, stored_state(block), {"specs": specs(block), "numbers": numbers})


def read_part(path: Path) -> Part | None:
    """The block and the numbers of `save_part`, or None if there is no whole file."""
    found = read_tensors(path)
    if found is None:
        return None
    tensors, notes = found
    layers, shared = build_all(notes["specs"])
    for name, stored in layers.items():
        keys = {key: f"{name}.stored.{key}" for key in stored.state_dict()}
        stored.load_state_dict({key: tensors[shared.get(full, full)] for key, full in keys.items()})
    inside = tuple(f"{name}." for name in layers)
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
    return Part(layers, others, notes["numbers"])


def put_part(block: nn.Module, part: Part) -> None:
    """Make a block what it was when `save_part` wrote it; biases of its linear layers are those it has."""
    tensors = dict(block.named_parameters()) | dict(block.named_buffers())
    device = next(iter(tensors.values())).device
    for name, stored in part.layers.items():
        put_in(block, name, stored.to(device))
    for name, tensor in part.others.items():
        place(block, name, tensor.to(device, tensors[name].dtype))
