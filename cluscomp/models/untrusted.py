"""What others made a model of is looked at before a library opens it, which might hang, crash or take all memory.

Only the standard library is loaded here, but for what a function needs.
"""

import json
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluscomp.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MOST_LAYERS = 1000  # eight times as many as any model of today has
LAYERS = re.compile(r"(layers?|blocks?|block_count|depth)$")  # names of such numbers, in any family's config
SIZES = re.compile(r"(size|dim|heads?|layers?|types?|embd|inner|act|activation_function|_id)$|^(num|n)_|rope")
MOST_VALUES = 10_000_000  # of a list in a GGUF file's head: tokens, scores, merges
SAID = 300  # characters of another library's message


def check_folder(folder: Path) -> None:
    """Raise InputError, with file, key and value, for a model's folder that cannot be opened.

    It has something else than a file under a file's name (a pipe, a device, links that never end), or its config.json
    is no JSON, says more layers than MOST_LAYERS, or is refused by transformers.
    """
    try:
        for path in sorted(folder.iterdir()):
            _check_file(path)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror}; a model's folder has to be readable"
        ) from error
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({_said(error)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: {type(values).__name__} where the names and values of a config are needed")
    check_counts(str(path), values)
    for key in ("model_type", "dtype", "torch_dtype"):
        if not isinstance(values.get(key), str | None):
            raise InputError(f"{path}: {key} = {values[key]}: a name is needed")
    if not isinstance(values.get("quantization_config"), dict | None):
        raise InputError(f"{path}: quantization_config = {values['quantization_config']}: names and values are needed")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a config class makes of values it cannot use
        said = _said(error)
        if not any(key in said for key in values):
            said = f"nothing can be made of {_sizes(values)}: {said}"
        raise InputError(f"{path}: {said}") from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise InputError(f"{path}: num_hidden_layers = {layers}: at least 1 is needed")


def _check_file(path: Path) -> None:
    """Raise InputError for a pipe, a device or a socket, OSError for links that never end; a dangling one is let be."""
    try:
        path.stat()
    except FileNotFoundError:
        return
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: neither a file nor a folder, but a pipe, device or socket; it is not opened")


def check_counts(place: str, values: Mapping[str, Any]) -> None:
    """Raise InputError for a number of layers, by its name in (nested) values of a config, that no model has."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_counts(place, value)
        elif LAYERS.search(str(key)) and isinstance(value, int | float) and not value <= MOST_LAYERS:
            raise InputError(f"{place}: {key} = {value}: at most {MOST_LAYERS} can be")


@contextmanager
def made_of(config: "PreTrainedConfig") -> Iterator[None]:
    """Name a config, and what of it decides shapes, if no model can be made of it or run (InputError)."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a model class makes of values it cannot use
        file = f"{Path(config.name_or_path) / 'config.json'}" if config.name_or_path else "the model's config"
        sizes = _sizes(config.get_text_config().to_diff_dict())
        raise InputError(f"{file}: no model can be made of {sizes}: {_said(error)}") from error


def _sizes(values: Mapping[str, Any]) -> str:
    """What of a config decides the kinds and shapes of tensors."""
    return ", ".join(f"{key} = {value}" for key, value in values.items() if SIZES.search(key))[: 2 * SAID]


def check_tokens(folder: Path, config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise InputError if texts could become tokens that the model does not have.

    Special tokens beyond the vocabulary that no text begins with (one for padding, say) are let be.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        return
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {*tokenizer("a", verbose=False).input_ids}
    for token, number in tokenizer.get_vocab().items():
        if number >= size and (number in used or number not in special):
            raise InputError(
                f"{folder}: its tokenizer gives {token!r} the number {number}, but by config.json vocab_size = {size}; "
                "tokenizer and model do not belong together"
            )


def check_dtypes(found: Mapping[str, str], dtypes: Mapping[str, "torch.dtype"], needed: set[str], folder: Path) -> None:
    """Raise InputError for a tensor of a type that no dense model has; `found` are types by tensor, as files name them.

    `dtypes` are those that can be read, of which the tensors that are `needed` take those with a fraction alone.
    """
    for name, kind in found.items():
        if kind not in dtypes or (name in needed and not dtypes[kind].is_floating_point):
            raise InputError(
                f"{folder}: tensor {name} is of type {kind}; a model of F64, F32, F16 or BF16 is needed here, so give "
                "the original in 16 or 32 bit"
            )


class _Head:
    """The head of a GGUF file, read from its beginning. All that is wrong with it is a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order = data, 4, "<"
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if struct.unpack_from("<I", data, 4)[0] & 0xFFFF == 0:
            self.order = ">"

    def number(self, kind: str) -> Any:
        """The next number, of a kind as `struct` names it."""
        self._check(struct.calcsize(kind))
        (value,) = struct.unpack_from(self.order + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def text(self) -> str:
        """The next text, after its length."""
        length = self.number("Q")
        self._check(length)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        """The next value of a kind as GGUF numbers them; of a list nothing is returned."""
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.number(_kind(kind))
        inside, count = self.number("I"), self.number("Q")
        if count > MOST_VALUES:
            raise ValueError(f"a list of {count} values")
        if inside == 8:
            for _ in range(count):
                self.text()
        else:
            self._check(count * struct.calcsize(_kind(inside)))
            self.at += count * struct.calcsize(_kind(inside))
        return None

    def _check(self, length: int) -> None:
        if self.at + length > len(self.data):
            raise ValueError(f"byte {self.at}: {length} bytes should follow, but the file ends at {len(self.data)}")


def _kind(number: int) -> str:
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    if number not in kinds:
        raise ValueError(f"a value of kind {number}, which GGUF does not have")
    return kinds[number]


def check_gguf(path: Path) -> None:
    """Raise InputError unless the head of a GGUF file can be read, and the tensors it names lie within the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_head(path, data)
    except (ValueError, struct.error, KeyError) as error:
        raise InputError(f"model.file={path}: truncated, or not a GGUF file ({_said(error)})") from error


def _check_head(path: Path, data: mmap.mmap) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    head = _Head(data)
    head.number("I")  # the version
    tensors, values = head.number("Q"), head.number("Q")
    alignment = 32
    for _ in range(values):
        key = head.text()
        value = head.value(head.number("I"))
        check_counts(f"model.file={path}", {key: value})
        alignment = value if key == "general.alignment" else alignment
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment = {alignment}")
    ends: list[tuple[str, int]] = []
    for _ in range(tensors):
        name = head.text()
        dimensions = head.number("I")
        if not 0 < dimensions <= 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = [head.number("Q") for _ in range(dimensions)]
        kind = head.number("I")
        if kind not in {*GGMLQuantizationType}:
            raise InputError(
                f"model.file={path}: tensor {name} is of type number {kind}, which the package gguf {version('gguf')} "
                "does not know; a newer one might, or the file is damaged"
            )
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not math.prod(shape) or shape[0] % block:
            raise ValueError(f"tensor {name} has the shape {shape}")
        ends.append((name, head.number("Q") + math.prod(shape) // block * size))
    begin = -(-head.at // alignment) * alignment
    for name, end in ends:
        if begin + end > len(data):
            raise ValueError(f"tensor {name} should end at byte {begin + end}, but the file does at {len(data)}")


@contextmanager
def read_as_gguf(path: Path) -> Iterator[None]:
    """Name a GGUF file that a library cannot make sense of (InputError)."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever transformers and gguf make of values they cannot use
        raise InputError(f"model.file={path}: truncated, or not a GGUF file ({_said(error)})") from error


def _said(error: Exception) -> str:
    """What a library says of an error, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:SAID]
