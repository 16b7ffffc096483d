"""Sealed safetensors: tensors and plain values with a hash of both."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluscomp.store.files import new_file
from cluscomp.store.records import to_json

log = logging.getLogger(__name__)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
    """Write tensors and plain values as one safetensors file with a hash of both, whole or not at all."""
    text = to_json(notes)
    with new_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"notes": text, "sha256": _digest(tensors, text)})


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `write_tensors` wrote, or None, with a line in the log, if it is damaged or altered."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device=device) as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(tensors, metadata["notes"]):
            raise ValueError("its hash is wrong")
        return tensors, json.loads(metadata["notes"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): it is made anew", path, error)
        return None


def _digest(tensors: dict[str, torch.Tensor], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
