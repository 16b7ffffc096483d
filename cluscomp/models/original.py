"""What is known of transformers: open an original model block by block, find its blocks and linear layers."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import Parameter
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cluscomp.checkpoint import NAME, shapes_of
from cluscomp.errors import InputError
from cluscomp.forms.apart import KeptLinear, Part, take_apart, together
from cluscomp.forms.layers import place, reshape
from cluscomp.forms.linear import CompressedLinear
from cluscomp.forms.multimodal import for_text, opener
from cluscomp.models.names import Files, Source
from cluscomp.models.sources import read_config
from cluscomp.models.untrusted import check_dtypes, check_tokens, made_of
from cluscomp.process import give_memory_back

log = logging.getLogger(__name__)
OTHERS = re.compile("vision|visual|image|audio|speech")  # in names of a model's parts that are not for text
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
        self.manner: Any = None  # how its blocks are called, known once a `Walk` was compared with it
        self.config, self.tokenizer = read_config(folder), read_tokenizer(folder)
        self._said_dtype = self.config.dtype  # a model that is made of the config changes it
        self._check_config()
        check_tokens(folder, self.config, self.tokenizer)
        self._files = Files(folder)
        self._check_ties()

    def _check_config(self) -> None:
        check_dense(self.config)

    def _check_ties(self) -> None:
        """Where the file holds other numbers under a name that the config ties (a head of its own), let the file win.

        As transformers does. Raises InputError if that cannot be said in the config.
        """
        if not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return
        for name, source in self._outline.all_tied_weights_keys.items():
            ones = [self._sources[one].tensors[0][0] for one in (name, source) if one in self._sources]
            if len(set(ones)) == 2 and not self._equal(name, source):
                log.warning("%s: tied to %s by config.json, but with numbers of its own, which count", name, source)
                self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
                del self._outline, self._sources
                if name in self._outline.all_tied_weights_keys:
                    raise InputError(
                        f"{self.folder}: {name} is tied to {source}, but the file has other numbers for it"
                    )

    @cached_property
    def _outline(self) -> PreTrainedModel:
        return without_numbers(self.config)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return self._files.sources(self._outline)

    @cached_property
    def _parts(self) -> dict[str, Part]:
        return take_apart(deepcopy(self._outline))

    @cached_property
    def _wide(self) -> list[str]:
        """Parts of names whose tensors transformers keeps in float32 where the model is in 16 bits."""
        return list(self._outline._get_dtype_plan(self.dtype)) if self.dtype.itemsize == 2 else []

    def _equal(self, *names: str) -> bool:
        first, second = (tensor for name in names for _, tensor in self.tensors([name]))
        return torch.equal(first, second)

    def model(self) -> PreTrainedModel:
        """The model with everything but its blocks loaded; the blocks' parameters are on the meta device.

        Raises InputError if a tensor is missing, or the model has a part that cannot be compressed.
        """
        with made_of(self.config), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = opener(self.config).from_config(self.config, dtype=self.dtype)
            reshape(model, shapes_of(self.config))
        names = list(model.state_dict())
        self._sources = self._files.sources(model)
        missing = [name for name in names if name not in self._sources and name not in model.all_tied_weights_keys]
        if missing:
            raise InputError(
                f"{self.folder}: no tensor {missing[0]} ({len(missing)} of {len(names)} missing), under that name or "
                "another that transformers knows; the files are not whole, or not those of config.json's model"
            )
        found = [self._sources[key] for key, _ in model.named_parameters() if key in self._sources]
        needed = {name for source in found for name, _ in source.tensors}
        self._parts = take_apart(model)
        check_supported(model)
        prefixes = tuple(f"{name}." for name in block_names(model))
        check_dtypes({name: kind for name, (kind, _) in self._files.heads.items()}, DTYPES, needed, self.folder)
        self._fill(model, [name for name in model.state_dict() if not name.startswith(prefixes) and self.has(name)])
        model.tie_weights()
        model.requires_grad_(False)
        for module in model.modules():
            module._buffers = {key: b if b is None else b.to(self.device) for key, b in module._buffers.items()}
        model.eval()
        self._say_how_to_generate(model)
        return model

    def _say_how_to_generate(self, model: PreTrainedModel) -> None:
        """Give the model the folder's own settings of generation. Raises InputError if their file is damaged."""
        if (self.folder / GENERATION).is_file():  # what transformers makes of the config otherwise knows one end token
            try:
                model.generation_config = GenerationConfig.from_pretrained(self.folder)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{self.folder / GENERATION}: {str(error).splitlines()[0]}") from error

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that config.json names, or, if it names none, that of the first tensor in the files."""
        said = self._said_dtype or DTYPES[next(iter(self._files.heads.values()))[0]]
        return said if isinstance(said, torch.dtype) else getattr(torch, said)

    def size(self) -> dict[str, float]:
        """Bits per weight and bytes of the weights as they lie in the folder."""
        bits, weights = 0, 0
        for kind, shape in self._files.heads.values():
            numbers = math.prod(shape)
            bits, weights = bits + numbers * 8 * DTYPES[kind].itemsize, weights + numbers
        per_weight = bits / weights
        return {
            "paper_bits_per_weight": per_weight,
            "linear_bits_per_weight": per_weight,
            "model_bits_per_weight": per_weight,
            "checkpoint_bytes": sum(path.stat().st_size for path in self._files.paths),
        }

    def external(self) -> dict[str, Any] | None:
        """What made a model that another library compressed, for the record; None of any other."""
        return None

    @property
    def positions(self) -> int | None:
        """The most tokens that the model takes, or None where its config names no such number."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def check_length(self, key: str, tokens: int) -> None:
        """Raise InputError if a window of so many tokens is longer than the model takes; `key` is its setting."""
        most = self.positions
        if most is not None and tokens > most:
            raise InputError(f"{key}={tokens}: {self.folder.name} has {most} positions; give {key}={most} or less")

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
        self._fill(model, [f"{prefix}{key}" for key in blocks(model)[index].state_dict()])

    def load_all(self) -> PreTrainedModel:
        """The whole dense model in memory."""
        model = self.model()
        for index in range(len(blocks(model))):
            self.load_block(model, index)
        return model

    def tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of the model by their names in it, as it computes with them."""
        wanted: dict[int, list[str]] = {}
        found: dict[int, Source] = {}
        for name in names:
            source = self._source(name)
            found[id(source)] = source
            wanted.setdefault(id(source), []).append(name)
        for source, made in self._files.read(found.values(), lambda: self._outline):
            for name in wanted[id(source)]:
                part = self._parts.get(name)
                tensor = made[name] if part is None else part.of(made[part.name])
                dtype = tensor.dtype
                if tensor.is_floating_point():
                    dtype = torch.float32 if any(key in name for key in self._wide) else self.dtype
                # a copy, or a norm that stays would keep all that was read of the file in memory
                yield name, tensor.to(self.device, dtype, copy=True).contiguous()

    def file_dtype(self, name: str) -> torch.dtype:
        """The dtype in the file of a tensor of the model."""
        return DTYPES[self._files.heads[self._source(name).tensors[0][0]][0]]

    def as_in_transformers(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the model, by name, as transformers' own model has them."""
        return together(tensors, self._parts)

    def has(self, name: str) -> bool:
        """Whether the files have a tensor of the model, by its name in it."""
        part = self._parts.get(name)
        return (name if part is None else part.name) in self._sources

    def _source(self, name: str) -> Source:
        part = self._parts.get(name)
        return self._sources[name if part is None else part.name]

    def _fill(self, model: nn.Module, names: list[str]) -> None:
        for name, tensor in self.tensors(names):
            place(model, name, tensor)


def without_numbers(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that transformers makes of a config, on the meta device. Raises InputError if none can be made."""
    with made_of(config), torch.device("meta"):
        model: PreTrainedModel = opener(config).from_config(deepcopy(config))  # which changes it
        reshape(model, shapes_of(config))
    return model


def quantizer(config: PreTrainedConfig) -> str | None:
    """The name of what quantised a model ("cluscomp", "gptq", ...), or None for one in 16 or 32 bit."""
    found = getattr(config, "quantization_config", None)
    said = found if isinstance(found, dict | None) else found.to_dict()
    if said is None or (said.get("quant_method") == NAME and said.get("weights") == {}):  # shapes alone
        return None
    return str(said.get("quant_method"))


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
    """Names of the decoder blocks: the module list that is as long as the config's number of layers, or the longest.

    Lists inside such a list do not count, nor those outside of what transformers calls the decoder, nor those of images
    and sound. Of several the first one is taken. Raises InputError if there is none.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = {id(one) for _, one in _lists(model.get_decoder())}
    lists = dict(_lists(model))
    found = {name: len(one) for name, one in lists.items() if id(one) in decoder} or {
        name: len(one) for name, one in lists.items()
    }
    if not found:
        raise InputError(f"{type(model).__name__}: has no list of blocks, so there is nothing to compress")
    best = max(found, key=lambda name: (found[name] == count, found[name]))
    return [f"{best}.{index}" for index in range(found[best])]


def _lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost module lists with parameters, but those of images and sound, by name."""
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if isinstance(child, nn.ModuleList) and not OTHERS.search(name) and next(child.parameters(), None) is not None:
            yield name, child
        else:
            yield from _lists(child, f"{name}.")


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks in order."""
    return [model.get_submodule(name) for name in block_names(model)]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The dense linear layers inside a block that are compressed, by their name in the block."""
    return {name: module for name, module in block.named_modules() if is_dense(module)}


def is_dense(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that can be compressed and is not."""
    other = (CompressedLinear, KeptLinear)
    return isinstance(module, nn.Linear) and not isinstance(module, other) and _plain(type(module))  # type: ignore[arg-type]


@cache
def _plain(kind: type[nn.Linear]) -> bool:
    """Whether a class of linear layers computes x W^T + b."""
    if kind.forward is nn.Linear.forward:
        return True
    layer = kind.__new__(kind)
    nn.Linear.__init__(layer, 3, 2)
    x_TI = torch.ones(4, 3)
    try:
        return torch.allclose(layer(x_TI), nn.functional.linear(x_TI, layer.weight, layer.bias))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


def norms(model: nn.Module) -> dict[str, Parameter]:
    """The parameters of norms, by name: vectors that belong to no linear layer, and to nothing else with a matrix."""
    other = {
        id(vector)
        for part in model.modules()
        if isinstance(part, nn.Linear) or any(one.ndim > 1 for one in part.parameters(recurse=False))
        for vector in part.parameters()
    }
    return {name: vector for name, vector in for_text(model).items() if vector.ndim == 1 and id(vector) not in other}


def check_supported(model: PreTrainedModel) -> None:
    """Raise InputError for a model without a linear layer in its blocks, and one whose blocks share such layers."""
    tied = model.all_tied_weights_keys
    for name, block in zip(block_names(model), blocks(model)):
        if shared := next((key for key in linears(block) if f"{name}.{key}.weight" in tied), None):
            raise InputError(f"{name}.{shared}: another block has it, too; give a model whose blocks share no weights")
    if not any(linears(block) for block in blocks(model)):
        raise InputError(f"{type(model).__name__}: has no linear layer in its blocks, so there is nothing to compress")
