"""What is known of transformers: open an original model block by block, find its blocks and linear layers."""

import hashlib
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import Parameter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cluscomp.errors import InputError
from cluscomp.forms.layers import place
from cluscomp.forms.linear import CompressedLinear
from cluscomp.models.sources import read_config, weight_files
from cluscomp.models.untrusted import check_dtypes, check_tokens, made_of
from cluscomp.process import give_memory_back
from cluscomp.store.files import file_hash

log = logging.getLogger(__name__)
GENERATION = "generation_config.json"
DTYPES = {  # by their names in safetensors
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Original:
    """The original model in its folder, read tensor by tensor; the dense model is never in memory as a whole."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Read config, tokenizer and the list of tensors. Raises InputError if one of them cannot be used."""
        self.folder, self.dtype, self.device = folder, dtype, device
        self.gives_tuples: bool | None = None  # whether its blocks do, known once a `Walk` was compared with it
        self.config, self.tokenizer = read_config(folder), read_tokenizer(folder)
        self._check_config()
        check_tokens(folder, self.config, self.tokenizer)
        self._shards: dict[str, Path] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, "pt") as shard:
                    names = list(shard.keys())
            except SafetensorError as error:
                raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from error
            twice = next((name for name in names if name in self._shards), None)
            if twice is not None:
                raise InputError(f"{path}: {twice} is also in {self._shards[twice].name}; leave one of the files there")
            self._shards |= dict.fromkeys(names, path)
        self._check_ties()

    def _check_config(self) -> None:
        check_dense(self.config)

    def _check_ties(self) -> None:
        """Where the file holds other numbers under a name that the config ties (a head of its own), let the file win.

        As transformers does. Raises InputError if that cannot be said in the config.
        """
        if not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return
        for name, source in self._tied().items():
            if name in self._shards and source in self._shards and not self._equal(name, source):
                log.warning("%s: tied to %s by config.json, but with numbers of its own, which count", name, source)
                self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
                if name in self._tied():
                    raise InputError(
                        f"{self.folder}: {name} is tied to {source}, but the file has other numbers for it"
                    )

    def _tied(self) -> dict[str, str]:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(self.config))
        return dict(model.all_tied_weights_keys)

    def _equal(self, *names: str) -> bool:
        first, second = (tensor for name in names for _, tensor in self.tensors([name]))
        return torch.equal(first, second)

    def model(self) -> PreTrainedModel:
        """The model with everything but its blocks loaded; the blocks' parameters are on the meta device.

        Raises InputError if a tensor is missing, or the model has a part that cannot be compressed.
        """
        with made_of(self.config), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        check_supported(model)
        prefixes = tuple(f"{name}." for name in block_names(model))
        names = list(model.state_dict())
        tied = set(model.all_tied_weights_keys)
        missing = [name for name in names if name not in self._shards and name not in tied]
        if missing:
            raise InputError(
                f"{self.folder}: no tensor {missing[0]} ({len(missing)} of {len(names)} missing). If the file's names "
                "differ from transformers', load and save the model once with transformers and give that folder"
            )
        check_dtypes(self._kinds(), DTYPES, {name for name, _ in model.named_parameters()}, self.folder)
        self._fill(model, [name for name in names if not name.startswith(prefixes) and name in self._shards])
        model.tie_weights()
        model.requires_grad_(False)
        for module in model.modules():
            module._buffers = {key: b if b is None else b.to(self.device) for key, b in module._buffers.items()}
        model.eval()
        if (self.folder / GENERATION).is_file():  # what transformers makes of the config otherwise knows one end token
            try:
                model.generation_config = GenerationConfig.from_pretrained(self.folder)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{self.folder / GENERATION}: {str(error).splitlines()[0]}") from error
        return model

    def size(self) -> dict[str, float]:
        """Bits per weight and bytes of the weights as they lie in the folder."""
        bits, weights = 0, 0
        for path in sorted(set(self._shards.values())):
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    part = shard.get_slice(name)
                    numbers = math.prod(part.get_shape())
                    bits, weights = bits + numbers * 8 * DTYPES[part.get_dtype()].itemsize, weights + numbers
        per_weight = bits / weights
        return {
            "paper_bits_per_weight": per_weight,
            "linear_bits_per_weight": per_weight,
            "model_bits_per_weight": per_weight,
            "checkpoint_bytes": sum(path.stat().st_size for path in set(self._shards.values())),
        }

    def external(self) -> dict[str, Any] | None:
        """What made a model that another library compressed, for the record; None of any other."""
        return None

    def check_length(self, key: str, tokens: int) -> None:
        """Raise InputError if a window of so many tokens is longer than the model takes; `key` is its setting."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise InputError(f"{key}={tokens} is longer than the {most} positions of {self.folder.name}")

    @contextmanager
    def block(self, model: PreTrainedModel, index: int) -> Iterator[nn.Module]:
        """Block `index` of a model made by `model()`, in memory for the length of the `with` block."""
        self.load_block(model, index)
        block = blocks(model)[index]
        try:
            yield block
        finally:
            for name, parameter in block.named_parameters():
                place(block, name, parameter.data.to("meta"))
            give_memory_back()

    def load_block(self, model: PreTrainedModel, index: int) -> None:
        """Read the parameters of block `index` into the model."""
        prefix = f"{block_names(model)[index]}."
        self._fill(model, [name for name in model.state_dict() if name.startswith(prefix)])

    def load_all(self) -> PreTrainedModel:
        """The whole dense model in memory."""
        model = self.model()
        for index in range(len(blocks(model))):
            self.load_block(model, index)
        return model

    def tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of the file, by their names there, as the model computes with them."""
        for path in sorted({self._shards[name] for name in names}):
            with safe_open(path, "pt") as shard:
                for name in (name for name in names if self._shards[name] == path):
                    tensor = shard.get_tensor(name)
                    dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
                    # a copy, or a norm that stays would keep all that was read of the file in memory
                    yield name, tensor.to(self.device, dtype, copy=True)

    def _kinds(self) -> dict[str, str]:
        """The types of all tensors, as the files name them."""
        found: dict[str, str] = {}
        for path in sorted(set(self._shards.values())):
            with safe_open(path, "pt") as shard:
                found |= {name: shard.get_slice(name).get_dtype() for name in shard.keys()}  # noqa: SIM118
        return found

    def file_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the file."""
        with safe_open(self._shards[name], "pt") as shard:
            return DTYPES[shard.get_slice(name).get_dtype()]

    def _fill(self, model: nn.Module, names: list[str]) -> None:
        for name, tensor in self.tensors(names):
            place(model, name, tensor)


def quantizer(config: PreTrainedConfig) -> str | None:
    """The name of what quantised a model ("cluscomp", "gptq", ...), or None for one in 16 or 32 bit."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method") if isinstance(found, dict) else found.quant_method)


def check_dense(config: PreTrainedConfig) -> None:
    """Raise InputError for a model that is quantised: it can be scored, but not compressed."""
    if quantizer(config) is not None:
        raise InputError(f"{config.name_or_path}: this model is already quantised; give the original in 16 or 32 bit")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises InputError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer class makes of files it cannot use
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: no usable tokenizer: {reason}") from error


def block_names(model: PreTrainedModel) -> list[str]:
    """Names of the decoder blocks: the module list that is as long as the config's number of layers.

    Raises InputError if there is none, or more than one.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and next(module.parameters(), None) is not None
    ]
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise InputError(f"{type(model).__name__}: need one list of {count} blocks, found {listed}")
    return [f"{found[0]}.{index}" for index in range(count)]


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks in order."""
    return [model.get_submodule(name) for name in block_names(model)]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The dense linear layers inside a block, by their name in the block."""
    return {name: module for name, module in block.named_modules() if is_dense(module)}


def is_dense(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that is not compressed."""
    return isinstance(module, nn.Linear) and not isinstance(module, CompressedLinear)


def norms(model: nn.Module) -> dict[str, Parameter]:
    """The parameters of norms, by name: vectors that belong to no linear layer."""
    linear = {id(vector) for part in model.modules() if isinstance(part, nn.Linear) for vector in part.parameters()}
    return {name: vector for name, vector in model.named_parameters() if vector.ndim == 1 and id(vector) not in linear}


def check_supported(model: PreTrainedModel) -> None:
    """Raise InputError, by name, for a matrix inside a block that is not an `nn.Linear` (GPT-2's Conv1D, experts)."""
    for block_name, block in zip(block_names(model), blocks(model)):
        layers = linears(block)
        for name, parameter in block.named_parameters():
            layer, _, _ = name.rpartition(".")
            if parameter.ndim >= 2 and layer not in layers:
                kind = type(block.get_submodule(layer)).__name__
                raise InputError(
                    f"{block_name}.{name}: a {'x'.join(map(str, parameter.shape))} parameter of {kind}; "
                    "only nn.Linear layers can be compressed, so this model is not supported"
                )


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model folder's config, tokenizer and weights: the identity of an original model."""
    return combined(file_hashes(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model folder that decides what the model is, by name.

    In Hugging Face's cache a weight file is a link to a file named by its own hash, which saves reading it.
    """
    found, weights = {}, weight_files(folder)
    for path in sorted(folder.iterdir()):
        if path in weights or path.suffix in {".json", ".model", ".jinja"}:
            stored_name = path.resolve().name
            found[path.name] = stored_name if re.fullmatch("[0-9a-f]{64}", stored_name) else file_hash(path)
    return found


def combined(hashes: dict[str, str]) -> str:
    """SHA-256 over files' names and hashes."""
    return hashlib.sha256("".join(f"{name}:{value}\n" for name, value in hashes.items()).encode()).hexdigest()
