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
CONVERTER = 2  # of `convert`: what an earlier one made is not taken
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = (8.0, 32.0)  # how much Llama 3.1 and 3.3, and 3.2, scale positions
SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")  # keys, after the architecture


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

    Raises InputError for a file of which transformers would make another model: without one of its tensors, or without
    its scaling of positions.

    transformers marks a model read from GGUF as quantised and then refuses to save it, hence the fresh model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with read_as_gguf(path), opened_once(path), _unread() as passed_over:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        told, frequencies = _of_positions(path)
    read, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[problem]:  # transformers has filled them with random numbers, or left them
            raise InputError(f"model.file={path}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}")
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    kind = values.pop("model_type")
    if FREQUENCIES in passed_over:
        values["rope_parameters"] = _rope_of(path, frequencies, AutoConfig.for_model(kind, **values))
        passed_over.remove(FREQUENCIES)
    if passed_over:
        raise InputError(
            f"model.file={path}: transformers {version('transformers')} reads {kind} without tensor {passed_over[0]} "
            f"({len(passed_over)} such), so it would be another model; give the original as a folder"
        )
    config = AutoConfig.for_model(kind, **values)
    _check_scaling(path, told, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    numbers = {name: tensor.to(getattr(torch, dtype)) for name, tensor in read.state_dict().items()}
    model.load_state_dict(numbers, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _unread() -> Iterator[list[str]]:
    """In it transformers' converter of GGUF files tells, in the list, which tensors it passes over."""
    from transformers import modeling_gguf_pytorch_utils

    converter: Any = modeling_gguf_pytorch_utils
    passed_over: list[str] = []

    def watched(kind: Any) -> Any:
        class Watched(kind):  # type: ignore[misc]
            def process(self, weights: Any, name: str, **more: Any) -> Any:
                made = super().process(weights, name, **more)
                if made.name is not None and made.name not in more["tensor_key_mapping"]:  # None: done with already
                    passed_over.append(name)
                return made

        return Watched

    plain, kinds = converter.TensorProcessor, converter.TENSOR_PROCESSORS
    converter.TENSOR_PROCESSORS = {name: watched(kind) for name, kind in kinds.items()}
    converter.TensorProcessor = watched(plain)
    try:
        yield passed_over
    finally:
        converter.TensorProcessor, converter.TENSOR_PROCESSORS = plain, kinds


def _of_positions(path: Path) -> tuple[dict[str, Any], Any]:
    """What a file says of its positions' scaling, by key, and by what it divides each frequency (None: nothing)."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    told = {key: reader.fields[key].contents() for key in reader.fields if key.partition(".")[2] in SCALING}
    return told, next((tensor.data.copy() for tensor in reader.tensors if tensor.name == FREQUENCIES), None)


def _rope_of(path: Path, frequencies: Any, config: Any) -> dict[str, Any]:
    """The rope parameters of Llama 3.1, 3.2 or 3.3 that give a file's frequencies. Raises InputError if none does."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain: dict[str, Any] = dict(config.rope_parameters or {})
    known = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = [known | {"factor": factor, "original_max_position_embeddings": 8192} for factor in LLAMA3]
    ours = torch.from_numpy(frequencies).float()
    inverse = plain.get("rope_theta", 1.0) ** (-torch.arange(len(ours)).float() / len(ours))
    for parameters in ({}, *scaled) if "rope_theta" in plain else ():
        config.rope_parameters = plain | parameters
        found = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0] if parameters else inverse
        if found.shape == ours.shape and torch.allclose(inverse / found, ours, rtol=1e-3, atol=0):
            return plain | parameters
    raise InputError(
        f"model.file={path}: tensor {FREQUENCIES} scales positions neither by 1 nor as Llama 3 does (by "
        f"{', '.join(map(str, LLAMA3))} from 8192 positions on), so it would be another model; give the original as a "
        "folder"
    )


def _check_scaling(path: Path, told: dict[str, Any], config: Any) -> None:
    """Raise InputError for a scaling of positions that a file names and that its config does not have."""
    kind = next((value for key, value in told.items() if key.endswith(".type")), "linear")  # llama.cpp's own
    if kind == "linear" and not {value for value in told.values() if value != kind} - {0, 1}:
        kind = "none"
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    made = [one["rope_type"] for one in (rope, *rope.values()) if isinstance(one, dict) and "rope_type" in one]
    if kind not in {"none", *made}:
        said = ", ".join(f"{key}={value}" for key, value in told.items())
        raise InputError(
            f"model.file={path}: {said}, but transformers {version('transformers')} scales positions by "
            f"'{', '.join(made) or 'default'}', so it would be another model; give the original as a folder"
        )
