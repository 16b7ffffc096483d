"""GGUF, which llama.cpp runs: grids of numbers as Q4_0, Q4_1 or Q8_0 where these hold them exactly, all else as floats.

A block there is 32 neighbouring inputs of an output: Q4_0 is d (q - 8) and Q4_1 d q + m with 4 bits a number, Q8_0 d q
with 8 bits and a sign; d and m are float16 (ggml-common.h of llama.cpp). Codebooks of a matrix's own have no place
there: it goes out as floats.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    TensorNameMap,
    get_tensor_name_map,
    quants,
)
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluscomp.errors import InputError
from cluscomp.formats import folder as folders
from cluscomp.formats.gguf_tokens import add_tokens
from cluscomp.forms.linear import compressed
from cluscomp.forms.stored import Stored
from cluscomp.forms.uniform import UniformWeight

FILE = "model.gguf"
Bytes = NDArray[np.uint8]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by transformers' name
BLOCK = 32
PLAIN = {
    torch.float32: GGMLQuantizationType.F32, torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}  # fmt: skip
FILES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32, GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1, GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write model and tokenizer as one file. Raises InputError for an architecture or a tokenizer it cannot hold."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(f"format=gguf: knows models of type {', '.join(ARCHITECTURES)}, not {config.model_type}")
    rope = getattr(config, "rope_parameters", None) or {}
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if rope.get("rope_type", "default") != "default" or windows:
        raise InputError(
            "format=gguf: knows neither scaled rotary embeddings nor windows of attention; use format=dense"
        )
    writer = GGUFWriter(folder / FILE, architecture, use_temp_file=True)
    lost = add_tokens(writer, tokenizer, config.vocab_size)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = _names(architecture, config.num_hidden_layers)
    layers = compressed(model)
    made: Counter[GGMLQuantizationType] = Counter()
    for name in [*folders.others(model), *(f"{layer}.weight" for layer in layers)]:
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise InputError(f"{name}: format=gguf has no such tensor in models of type {architecture}")
        layer = layers.get(name.removesuffix(".weight"))
        values, kind = _plain(model.get_parameter(name)) if layer is None else _layer(layer.stored, model.dtype)
        if turned := _turned_heads(architecture, place, heads, config.num_key_value_heads):
            values = _interleaved(values, turned)
        if layer is not None:
            made[kind] += 1
        writer.add_tensor(place, values, raw_dtype=kind)
    writer.add_file_type(FILES[made.most_common(1)[0][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for kind in made:
        if kind in PLAIN.values():
            lost.append(f"size: {made[kind]} of {len(layers)} layers, in forms that GGUF lacks, are {kind.name}")
    return lost


def read_back(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weight (O, I) as llama.cpp's package gguf rebuilds it: in the file's type, grids in float32."""
    reader = GGUFReader(folder / FILE)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    said = {key: field.contents() for key, field in reader.fields.items() if "tokenizer" not in key}
    architecture = said["general.architecture"]
    places = _names(architecture, said[f"{architecture}.block_count"])
    dtypes = {kind: dtype for dtype, kind in PLAIN.items()}
    for name in names:
        place = cast(str, places.get_name(f"{name}.weight", try_suffixes=(".weight",)))
        rows = quants.dequantize(tensors[place].data, tensors[place].tensor_type)
        counts = (said[f"{architecture}.attention.{name}"] for name in ("head_count", "head_count_kv"))
        if turned := _turned_heads(architecture, place, *counts):
            rows = _in_halves(rows, turned)
        yield name, torch.from_numpy(np.array(rows)).to(dtypes.get(tensors[place].tensor_type, torch.float32))


def _names(architecture: str, num_blocks: int) -> TensorNameMap:
    """The names of tensors there by those of transformers."""
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(kinds[architecture], num_blocks)


def _plain(tensor: Tensor) -> tuple[Bytes, GGMLQuantizationType]:
    """A tensor's bytes and type: vectors in float32, as llama.cpp wants them."""
    tensor = tensor.detach() if tensor.ndim > 1 else tensor.detach().float()
    if not bool(tensor.isfinite().all()):
        raise InputError(f"dtype={str(tensor.dtype)[6:]}: cannot hold all numbers of this model; dtype=float32 can")
    return _bytes(tensor), PLAIN[tensor.dtype]


def _layer(form: Stored, dtype: torch.dtype) -> tuple[Bytes, GGMLQuantizationType]:
    """The bytes and the type of a weight: the smallest that holds it exactly, or `dtype`."""
    return (_blocks(form) if isinstance(form, UniformWeight) else None) or _plain(form(dtype))


def _blocks(form: UniformWeight) -> tuple[Bytes, GGMLQuantizationType] | None:
    """A grid's numbers in blocks, (O, bytes of a row), or None where no type of block holds them exactly."""
    group, left = divmod(form.in_features, form.groups)
    if left or group % BLOCK or form.inputs is not None or form.kind_of_zeros == "float16" or form.width == 1:
        return None
    each = group // BLOCK  # blocks of a group
    scales_OB = form.scales.detach().repeat_interleave(each, 1)
    zeros_OB = form.offsets().repeat_interleave(each, 1)
    codes_OBC = form.unpacked().view(form.out_features, -1, BLOCK)
    steps_OBC = codes_OBC - zeros_OB[..., None].to(torch.int32)
    if int(steps_OBC.min()) >= -8 and int(steps_OBC.max()) <= 7:
        return _joined(scales_OB, _nibbles(steps_OBC + 8)), GGMLQuantizationType.Q4_0
    least_OB = -scales_OB.float() * zeros_OB
    if form.width <= 4 and torch.equal(least_OB.half().float(), least_OB):
        return _joined(scales_OB, least_OB.half(), _nibbles(codes_OBC)), GGMLQuantizationType.Q4_1
    if int(steps_OBC.min()) >= -128 and int(steps_OBC.max()) <= 127:
        return _joined(scales_OB, steps_OBC.to(torch.int8)), GGMLQuantizationType.Q8_0
    return None


def _nibbles(codes_OBC: Int[Tensor, "O B C"]) -> Tensor:
    """Numbers of 4 bits, (O, B, 32) -> (O, B, 16) bytes: the low halves are the first sixteen."""
    return (codes_OBC[..., :16] | codes_OBC[..., 16:] << 4).to(torch.uint8)


def _joined(*parts: Tensor) -> Bytes:
    """The bytes of blocks, part after part in each: (O, B) or (O, B, ...) -> (O, bytes of a row)."""
    rows, blocks = parts[0].shape
    split = [part.contiguous().view(torch.uint8).view(rows, blocks, -1) for part in parts]
    return torch.cat(split, 2).view(rows, -1).numpy()


def _bytes(tensor: Tensor) -> Bytes:
    """A tensor's rows as bytes."""
    return tensor.contiguous().view(torch.uint8).numpy()


def _turned_heads(architecture: str, place: str, heads: int, key_value_heads: int) -> int:
    """How many heads of a tensor have their halves in turn there; 0 of one whose rows are in the same order."""
    if architecture != "llama":
        return 0
    return heads if ".attn_q." in place else key_value_heads if ".attn_k." in place else 0


def _interleaved(rows: Bytes, heads: int) -> Bytes:
    """The rows of queries or keys in llama.cpp's order: each head's halves, which rotate together, in turn.

    `rows` are the bytes of a weight, (O, bytes of a row), or of a bias: four for each of its O numbers.
    """
    each = rows.reshape(-1, 4) if rows.ndim == 1 else rows
    return each.reshape(heads, 2, -1, each.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _in_halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows in llama.cpp's order in that of transformers again."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
