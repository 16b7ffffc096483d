"""A GGUF file as it is stored: the type and the bits of each tensor, what it says of how it was made; and its numbers.

Its type names are llama.cpp's: IQ2_XXS, Q4_K, ... A file of one such name (IQ2_M) mixes several of them.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from cluscomp.errors import InputError
from cluscomp.models.untrusted import read_as_gguf

COUNTED = "gguf_bits.json"  # beside the dense weights that a file's numbers stand for: what `outline` found
PLAIN = ("F32", "F16", "BF16")


def types_in(path: Path) -> list[str]:
    """Names of the quantised types of the file's tensors. Raises ValueError and the like on a damaged file."""
    from gguf import GGUFReader

    return sorted({tensor.tensor_type.name for tensor in GGUFReader(path).tensors} - {*PLAIN})


def outline(path: Path) -> dict[str, Any]:
    """What is known of a GGUF file without its numbers, as plain values.

    `architecture` and `blocks` as GGUF names and counts them; `tensors`: by its name in the file, of each its `type`,
    how many `weights` and how many `bits` it has, scales and padding with them; `made`: the name of the mix ("IQ2_M";
    where the file tells none, its types) and of the importance matrix what the file says of it, without folders.

    Raises InputError for a type that cannot be read, ValueError and the like on a damaged file.
    """
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(path)
    told = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    tensors: dict[str, dict[str, Any]] = {
        tensor.name: {
            "type": tensor.tensor_type.name, "weights": int(tensor.n_elements), "bits": 8 * int(tensor.n_bytes),
        }
        for tensor in reader.tensors
    }  # fmt: skip
    check_types(path, {name: tensor["type"] for name, tensor in tensors.items()})
    architecture = str(told["general.architecture"])
    kind = int(told.get("general.file_type", -1)) & ~LlamaFileType.GUESSED
    known = {int(one): one.name.removeprefix("MOSTLY_").removeprefix("ALL_") for one in LlamaFileType}
    types = sorted({tensor["type"] for tensor in tensors.values()} - {*PLAIN})
    importance = {
        name.rpartition(".")[2]: PureWindowsPath(value).name if isinstance(value, str) else value
        for name, value in told.items()
        if name.startswith("quantize.imatrix.")
    }
    return {
        "architecture": architecture,
        "blocks": int(told[f"{architecture}.block_count"]),
        "made": {
            "mix": known.get(kind) or "+".join(types or sorted({tensor["type"] for tensor in tensors.values()})),
            "importance_matrix": importance or None,
        },
        "file": {"name": path.name, "bytes": path.stat().st_size},
        "tensors": tensors,
    }


def check_types(path: Path, types: dict[str, str]) -> None:
    """Raise InputError, with a tensor's name, for a type whose numbers the package gguf cannot give.

    Args:
        path: the file, for the message.
        types: the type of each tensor by its name.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind in sorted({*types.values()} - {*PLAIN}):
        size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        try:
            dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType[kind])
        except NotImplementedError as error:
            name = next(name for name, one in types.items() if one == kind)
            raise InputError(
                f"model.file={path}: tensor {name} is of type {kind}, which the package gguf {version('gguf')} cannot "
                "read; quantise the original to another type, or install a newer gguf"
            ) from error


def matrices_in(found: dict[str, Any], layers: list[str]) -> dict[str, dict[str, Any]]:
    """The file's tensor of each linear layer, by the layer's name in transformers.

    `found` is an `outline`, `layers` are names such as model.layers.0.mlp.up_proj. Raises InputError for one that the
    file has no tensor of.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[found["architecture"]], found["blocks"])
    tensors = found["tensors"]
    known = {layer: f"{names.get_name(layer)}.weight" for layer in layers}
    lost = next((layer for layer, name in known.items() if name not in tensors), None)
    if lost is not None:
        raise InputError(f"{found['file']['name']}: no tensor {known[lost]} for {lost}, so its bits cannot be counted")
    return {layer: tensors[name] for layer, name in known.items()}


@contextmanager
def opened_once(path: Path) -> Iterator[None]:
    """In it all readers of the file are one, also in another such `with` block, and so are all maps of names.

    A reader walks through the whole vocabulary, which takes seconds, and transformers opens one for the config, one for
    the tokenizer and one for the weights; it makes the map of tensors' names anew for every module of the model.
    Raises InputError for a damaged file.
    """
    import gguf

    plain, map_of = gguf.GGUFReader, gguf.get_tensor_name_map
    with read_as_gguf(path):
        opened = gguf.GGUFReader(path)

    def reader(place: Any, *more: Any) -> Any:
        return opened if Path(place).resolve() == path.resolve() else plain(place, *more)

    gguf.GGUFReader = reader  # type: ignore[assignment, misc]
    gguf.get_tensor_name_map = functools.cache(map_of)
    try:
        yield
    finally:
        gguf.GGUFReader = plain  # type: ignore[misc]
        gguf.get_tensor_name_map = map_of


def convert(path: Path, folder: Path, dtype: str) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary folder of this dtype.

    transformers marks a model read from GGUF as quantised and then refuses to save it, hence the fresh model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with read_as_gguf(path), opened_once(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read, info = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:  # transformers has filled them with random numbers
            raise InputError(f"model.file={path}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}")
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    numbers = {name: tensor.to(getattr(torch, dtype)) for name, tensor in read.state_dict().items()}
    model.load_state_dict(numbers, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
