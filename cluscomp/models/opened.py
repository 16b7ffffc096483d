"""A checkpoint of ours that is too large for memory: its blocks stay in the file, and are read when they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp import checkpoint
from cluscomp.forms import adapters
from cluscomp.forms.apart import take_apart
from cluscomp.forms.head import put_head_in
from cluscomp.forms.layers import empty_layers, place, reshape
from cluscomp.forms.linear import BASE, MARK, compressed, parts_of_stored
from cluscomp.forms.multimodal import opener
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.models.untrusted import made_of
from cluscomp.process import give_memory_back


class Opened(Original):
    """A compressed model in its folder, of which all but the blocks, and one block at a time, are in memory."""

    def _check_config(self) -> None:
        """Compare the files' hashes. Raises InputError if one is missing or altered."""
        checkpoint.verify(self.folder)

    def _check_ties(self) -> None:
        """Nothing: it was written from a model whose ties held."""

    def model(self) -> PreTrainedModel:
        """The model with all but its blocks loaded."""
        said: dict[str, Any] = self.config.quantization_config
        with made_of(self.config), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = opener(self.config).from_config(self.config, dtype=self.dtype)
        take_apart(model)
        put_head_in(model)
        reshape(model, checkpoint.shapes_of(self.config))
        self._shared = empty_layers(model, said["weights"], self.dtype)
        self._adapted: dict[str, Tensor] = {}
        if said.get("adapter"):
            self._adapted = adapters.tensors(self.folder / said["adapter"])
            adapters.put_on(model, self.folder / said["adapter"])
        prefixes = tuple(f"{name}." for name in block_names(model))
        self._fill(model, [name for name in model.state_dict() if not name.startswith(prefixes)])
        model.tie_weights()
        model.requires_grad_(False)
        for module in model.modules():
            module._buffers = {
                key: one if one is None or one.is_meta else one.to(self.device) for key, one in module._buffers.items()
            }
        model.eval()
        self._say_how_to_generate(model)
        return model

    @contextmanager
    def block(self, model: PreTrainedModel, index: int) -> Iterator[nn.Module]:
        """Block `index` of a model made by `model()`, in memory for the length of the `with` block."""
        self.load_block(model, index)
        try:
            yield blocks(model)[index]
        finally:
            self.drop(model, index)

    def load_block(self, model: PreTrainedModel, index: int, device: torch.device | None = None) -> None:
        """Read block `index` into the model, to a device (None: where the model computes)."""
        prefix, block = f"{block_names(model)[index]}.", blocks(model)[index]
        self._fill(model, [f"{prefix}{key}" for key in block.state_dict()], device)

    def drop(self, model: PreTrainedModel, index: int) -> None:
        """Let go of the numbers of block `index`."""
        block = blocks(model)[index]
        for layer in compressed(block).values():
            layer.stored.forget()
        for name, tensor in block.state_dict().items():
            place(block, name, tensor.to("meta"))
        self._share(model)
        give_memory_back()

    def load_all(self) -> PreTrainedModel:
        """The model to be called as a whole: each block is read when it is called, and dropped again."""
        model = self.model()
        for index, block in enumerate(blocks(model)):
            block.register_forward_pre_hook(lambda _block, _args, index=index: self.load_block(model, index))
            block.register_forward_hook(lambda _block, _args, _given, index=index: self.drop(model, index))
        return model

    def stored(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the file, as they lie there, by their names in a model, on the CPU."""
        in_file = {name.replace(BASE, ""): name for name in names}
        for path in self._files.paths:
            with safe_open(path, "pt") as file:
                for key in [key for key in in_file if self._files.shards.get(key) == path]:
                    yield in_file[key], file.get_tensor(key)

    def _fill(self, model: nn.Module, names: list[str], device: torch.device | None = None) -> None:
        """Read tensors into the model: what is stored as it is, all else in the dtype that the model computes in."""
        device, inside = device or self.device, parts_of_stored(model)
        for name, tensor in self.stored([name for name in names if MARK not in name]):
            kind = tensor.dtype
            if tensor.is_floating_point() and not inside(name):
                kind = torch.float32 if any(key in name for key in self._wide) else self.dtype
            place(model, name, tensor.to(device, kind, copy=True))
        for name in names:
            if name in self._adapted:
                place(model, name, self._adapted[name].to(device, model.get_parameter(name).dtype, copy=True))
        self._share(model)

    def _share(self, model: nn.Module) -> None:
        """Let weights that have their codebooks from another one have that one's."""
        names = {name.replace(BASE, ""): name for name in compressed(model)}
        for name, first in self._shared.items():
            (layer, _, key), (other, _, _) = name.partition(".stored."), first.partition(".stored.")
            place, _, own = key.rpartition(".")
            weight, source = (model.get_submodule(f"{names[one]}.stored") for one in (layer, other))
            weight.get_submodule(place)._parameters[own] = source.get_parameter(key)
