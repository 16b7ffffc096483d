"""Compressed models as ordinary Hugging Face folders; importing this module teaches transformers to load them.

    import cluscomp.checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)

A transformers that has not imported it stops at the zero-byte `weight` tensors of the compressed layers (a shape
mismatch) instead of filling in random weights.
"""

import hashlib
import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cluscomp.errors import InputError
from cluscomp.forms import adapters
from cluscomp.forms.apart import put_together, take_apart
from cluscomp.forms.head import put_head_in
from cluscomp.forms.layers import check_values, empty_layers, reshape, specs, take_out
from cluscomp.forms.linear import BASE, MARK, compressed, parts_of_stored, storage_dtype, unique_tensors
from cluscomp.forms.multimodal import copy_processor, opener
from cluscomp.forms.stored import as_stored
from cluscomp.store.files import file_hash, new_folder
from cluscomp.store.records import content_key
from cluscomp.store.tensor_files import IN_A_FILE

log = logging.getLogger(__name__)
NAME = "cluscomp"  # the quantizer's, in config.json
FORMAT = 1  # version of what is stored; part of every stage's key
MANIFEST = "cluscomp.json"  # hashes of the folder's files
SHARD_SIZE = "5GB"


@register_quantization_config(NAME)
class CompressedConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json: for each compressed layer the kind and shapes of its stored weight.

    A layer that has its codebooks from another one names it under "shares"; the file holds them once, there.
    `adapter` says that LoRA adapters lie in that folder inside the checkpoint, `shapes` which linear layers, by name,
    have another shape [O, I] than the config gives them; a dense model may have those, and no compressed layer.
    """

    def __init__(
        self,
        weights: dict[str, dict[str, Any]],
        format: int = FORMAT,
        adapter: str | None = None,
        seal: str | None = None,
        shapes: dict[str, list[int]] | None = None,
        **_unused: Any,
    ) -> None:
        """Raises ValueError for a format version this code does not know, and for weights that are not those sealed."""
        if format != FORMAT:
            raise ValueError(f"quantization_config.format {format}: this version reads {FORMAT}")
        if not isinstance(weights, dict) or not all(isinstance(spec, dict) for spec in weights.values()):
            raise ValueError("quantization_config.weights: no kind and shapes for each layer")
        self.seal = content_key([weights, shapes] if shapes else weights)
        if seal not in (None, self.seal):
            raise ValueError("quantization_config.weights: altered since they were written; the checkpoint is damaged")
        self.quant_method = NAME  # type: ignore[assignment]
        self.format = format
        self.weights = weights
        self.adapter = adapter
        if shapes:
            self.shapes = shapes


def shapes_of(config: PreTrainedConfig) -> dict[str, list[int]]:
    """Shapes [O, I] of linear layers that are not those that the config gives them, by name."""
    said = getattr(config, "quantization_config", None)
    found = said.get("shapes") if isinstance(said, dict) else getattr(said, "shapes", None)
    return found or {}


@register_quantizer(NAME)
class CompressedQuantizer(HfQuantizer):
    """Builds the compressed layers on the meta device before transformers loads tensors into them."""

    requires_calibration = True  # a dense model cannot be compressed while loading
    writes_adapters = False  # `save` does
    quantization_config: CompressedConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        take_apart(model)
        put_head_in(model)
        reshape(model, shapes_of(model.config))
        shared = empty_layers(model, self.quantization_config.weights, torch.get_default_dtype())
        model.all_tied_weights_keys |= shared  # transformers reads them once and ties them
        self.folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if checkpoint_files:  # transformers fills in what is missing: never for codes and codebooks
            layers = compressed(model).items()
            expected = {f"{name}.{key}": tensor for name, layer in layers for key, tensor in layer.state_dict().items()}
            _check_tensors(
                checkpoint_files, {k: t for k, t in expected.items() if k not in model.all_tied_weights_keys}
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.adapter is not None and self.folder is not None:
            adapters.read(model, self.folder / self.quantization_config.adapter)
        check_values(model)
        for layer in compressed(model).values():
            layer.stored.requires_grad_(False)  # 16-bit numbers would not survive an optimizer: see `unfreeze`
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes, as it is stored; config.json then says which layers there are now.

        Raises ValueError if a trained number does not fit, and for adapters, of which it writes no folder.
        """
        adapter, shapes = self.quantization_config.adapter, shapes_of(model.config)
        if adapter is not None and not self.writes_adapters:
            raise ValueError(
                "save_pretrained would lose the model's LoRA adapters: cluscomp.checkpoint.save(model, tokenizer, "
                "folder) writes them, model.dequantize() adds them to the weights"
            )
        there = {name for name, _ in model.named_modules()}
        left = {name: shape for name, shape in shapes.items() if name in there}
        self.quantization_config = CompressedConfig(specs(model), adapter=adapter, shapes=left)
        model.config.quantization_config = self.quantization_config
        state = stored_state(model)
        for full, layer in compressed(model).items():
            name = full.removesuffix(BASE)
            rounded = {f"{name}.stored.{key}": tensor for key, tensor in as_stored(layer.stored).items()}
            state |= {key: rounded[key] for key in rounded.keys() & state.keys()}  # shared ones are another layer's
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """What `model.dequantize(dtype)` does, in place: transformers' own layers where the compressed ones are."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype  # a name, once it was saved
        for name in compressed(model):
            take_out(model, name, dtype)
        if self.quantization_config.adapter is not None:
            adapters.merge(model)
        for parameter in model.parameters():  # buffers (of rotary embeddings) keep theirs
            parameter.data = parameter.data.to(dtype)
        if left := put_together(model):
            log.warning(
                "%s and others stay apart under adapters; once merged: forms.apart.put_together(model)", left[0]
            )
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """After `dequantize`: what stays are shapes that config.json does not give the layers."""
        shapes = shapes_of(model.config)
        super().remove_quantization_config(model)
        if shapes:
            model.config.quantization_config = CompressedConfig({}, shapes=shapes)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:  # noqa: ARG002
        """None: the file has the names of the model in memory."""
        return []

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the codebooks."""
        return True

    is_qat_trainable = False  # without adapters, to Trainer; `unfreeze` sets it


def _check_tensors(files: list[str], expected: dict[str, torch.Tensor]) -> None:
    """Raise InputError if the files lack a tensor, or a stored one has another type or shape: before one is read."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found |= {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise InputError(f"{files[0]}: no tensor {missing[0]} ({len(missing)} missing)")
    for name, tensor in expected.items():
        said = IN_A_FILE.get(tensor.dtype), list(tensor.shape)
        if ".stored." in name and found[name] != said:
            raise InputError(
                f"{files[0]}: {name} is {found[name]}, but {said} by config.json; the checkpoint is damaged"
            )


def unfreeze(model: PreTrainedModel) -> list[nn.Parameter]:
    """Let what a loaded model's stored weights train learn, as float32 masters, and nothing else; returns them.

    For any optimizer or transformers' Trainer. Codebooks (or scales) load frozen, in 16 bits or 8, where a step would
    be lost or not finite. `save_pretrained` rounds the masters to what is stored, and loads as before.
    """
    model.requires_grad_(False)
    for layer in compressed(model).values():
        layer.stored.to_masters()
    model.hf_quantizer.is_qat_trainable = True  # type: ignore[union-attr]
    return list({id(part): part for part in model.parameters() if part.requires_grad}.values())


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None = None,
    card: str | None = None,
    original: Path | None = None,
) -> None:
    """Write model and tokenizer as a Hugging Face folder with hashes; the folder appears whole or not at all.

    Tensors that are not compressed are stored in the narrowest 16-bit type that holds them exactly: loaded in the dtype
    that the model computes in, it gives the same logits, bit by bit (up to 8 tokens: to rounding; see `forms.head`).

    Args:
        model: with compressed layers.
        tokenizer: beside it.
        folder: where to.
        dtype: what config.json names, in which the model is loaded unless another is given: the original's. None: the
            one that the model computes in.
        card: text of README.md.
        original: the folder of the original, whose files for images are copied.

    Raises OSError if the disk is full or the place cannot be written.
    """
    adapted = bool(adapters.parameters(model))
    shapes = shapes_of(model.config)
    # its weights are named when they are written: see `get_state_dict_and_metadata`
    config = CompressedConfig({}, adapter=adapters.FOLDER if adapted else None, shapes=shapes)
    model.config.quantization_config = config
    quantizer = CompressedQuantizer(config)
    quantizer.writes_adapters = True
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model._weight_conversions = []  # type: ignore[assignment]  # the file has the names of the model in memory
    with new_folder(folder) as unfinished:
        needed = sum(tensor.numel() * storage_dtype(tensor).itemsize for tensor in unique_tensors(model).values())
        free = shutil.disk_usage(unfinished).free
        if free < needed:
            raise OSError(f"{folder}: the checkpoint needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f}")
        try:
            model.save_pretrained(unfinished, max_shard_size=SHARD_SIZE)
        finally:
            quantizer.writes_adapters = False
        if dtype is not None:
            named = deepcopy(model.config)
            named.dtype = dtype
            named.save_pretrained(unfinished)
        if card is not None:
            (unfinished / "README.md").write_text(card, encoding="utf-8")
        tokenizer.save_pretrained(unfinished)
        if original is not None:
            copy_processor(original, unfinished)
        if adapted:
            adapters.write(model, unfinished / adapters.FOLDER)
        seal(unfinished)


def seal(folder: Path) -> None:
    """Write the hashes of all files of a folder into it, which `verify` compares."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": hashes}, indent=1) + "\n")


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model or block as they are written: tied ones once, without adapters.

    Stored weights are written as they are, what is not compressed in its storage dtype.
    """
    inside = parts_of_stored(model)
    return {
        name.replace(f"{BASE}.", "."): tensor.detach()
        .to(tensor.dtype if inside(name) else storage_dtype(tensor))
        .contiguous()
        for name, tensor in unique_tensors(model).items()
        if MARK not in name
    }


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Load a compressed model and check it: file hashes, every tensor present and used, codes within their codebooks.

    `dtype` None: the one that config.json names. A folder that `save_pretrained` wrote has no hashes, which is told.
    Raises InputError if anything is wrong.
    """
    folder = Path(folder).expanduser()
    if not (folder / MANIFEST).exists() and _is_ours(folder):
        log.warning("%s: no %s, as save_pretrained leaves it; its files are not compared with hashes", folder, MANIFEST)
    else:
        verify(folder)
    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        loaded: Any = opener(AutoConfig.from_pretrained(folder, trust_remote_code=False)).from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, **kwargs,
        )  # fmt: skip
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: {str(error).splitlines()[0]}") from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise InputError(f"{folder}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]} and others")
    if not isinstance(getattr(model.config, "quantization_config", None), CompressedConfig):
        raise InputError(f"{folder}: this is no model of cluscomp")
    return model if device is None else model.to(device)  # type: ignore[no-any-return]


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    said = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(said, dict) and said.get("quant_method") == NAME


def verify(folder: Path) -> dict[str, str]:
    """The folder's hashes by file name, after comparing them. Raises InputError if a file is missing or altered."""
    try:
        hashes: dict[str, str] = dict(json.loads((folder / MANIFEST).read_text())["sha256"])
        if not hashes:
            raise ValueError("it names no file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no readable {MANIFEST}, so this is no checkpoint of cluscomp") from error
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file() or file_hash(path) != expected:
            raise InputError(f"{path}: missing or altered since it was written (its hash is not the one in {MANIFEST})")
    return hashes


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over a checkpoint's weight files: equal for bitwise equal models."""
    hashes = verify(folder)
    weights = {name: value for name, value in hashes.items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
