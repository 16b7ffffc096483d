"""Files of tensors (safetensors): their bytes, on the disk and foreseen."""

import json
from pathlib import Path
from typing import Any

import torch

IN_A_FILE = {  # safetensors' names of types, in the order of their tensors in a file
    torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors files, headers and adapters included."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in a checkpoint's safetensors files: all of each file but its header, adapters included."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def file_bytes(shapes: dict[str, tuple[torch.dtype, torch.Size]]) -> int:
    """Bytes of the safetensors file that holds tensors of these types and shapes, header included.

    Of several files (a large checkpoint) the headers are counted as one, some hundred bytes off.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, order = 0, list(IN_A_FILE)
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        end = position + shape.numel() * dtype.itemsize
        header[name] = {"dtype": IN_A_FILE[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + position
