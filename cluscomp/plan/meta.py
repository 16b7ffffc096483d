"""A model's outline: its shapes without its weights, walked to learn what a stage will hold and do."""

import math
import re
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.forms.apart import take_apart
from cluscomp.forms.layers import Size, empty_layers, reshape, size_of, with_adapters
from cluscomp.forms.linear import can_stay_rebuilt, compressed, in_parts, parts_of_stored, unique_tensors
from cluscomp.forms.multimodal import opener
from cluscomp.forms.stored import Stored, described
from cluscomp.kernels.counting import Count
from cluscomp.kernels.work import Work
from cluscomp.models.original import block_names, blocks, check_supported, linears, norms, quantizer
from cluscomp.models.predictions import TOKENS_OF_A_PART
from cluscomp.models.untrusted import made_of
from cluscomp.models.walk import Walk
from cluscomp.plan.attention import FusedAttention
from cluscomp.plan.cost import Cost, worst
from cluscomp.plan.places import LOOKED, Place, chosen_all, observed
from cluscomp.store.tensor_files import file_bytes

NOTHING = Work()
# of all outlines of this process: stages, cells and checks ask for the same ones
_passes: dict[Any, "Pass"] = {}
_places: dict[Any, "list[dict[str, Place]]"] = {}


@dataclass(frozen=True)
class Pass:
    """Most bytes alive at once beside what was there before, and the work, of running a block once."""

    peak: float
    work: Work


class MetaModel:
    """A model on the meta device, which stages change as they will change the model, and what its shapes tell.

    `dtype` is what the model computes in, `device` "cpu" or "cuda", `ranks` how many processes share the work; with
    `shard` none of them holds the whole compressed model.
    """

    ranks, shard = 1, False

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
        """Raises InputError for a model that cannot be compressed, and for one that another quantizer wrote."""
        if quantizer(config) not in (None, checkpoint.NAME):
            raise InputError(f"{config.name_or_path}: what layers of '{quantizer(config)}' take is not known")
        self.config, self.dtype, self.device = deepcopy(config), dtype, device
        config = deepcopy(config)  # a model that is made of one changes it
        self._name = type(config).__name__, config.to_json_string(use_diff=False), dtype
        with made_of(config):
            of_file = getattr(config, "dtype", None) or torch.bfloat16  # before a model is made, which changes it
            of_file = getattr(torch, of_file) if isinstance(of_file, str) else of_file
            if quantizer(config) is not None:
                of_file = torch.bfloat16  # what our checkpoints keep is in 16 bits wherever these hold it
            with torch.device("meta"):
                model: PreTrainedModel = opener(config).from_config(config, dtype=dtype)
                reshape(model, checkpoint.shapes_of(config))
            self.file_bytes = of_file.itemsize  # of a number in the original's file
        take_apart(model)
        check_supported(model)
        model.tie_weights()
        model.requires_grad_(False)
        self.model = model.eval()
        self._walked = Walk(self.model)
        self.kept_bytes = min(of_file.itemsize, dtype.itemsize)  # of a number that is stored and not compressed
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
        self.block_numbers, self._largest = max(sizes), sizes.index(max(sizes))
        self.dense = {name: (layer.out_features, layer.in_features) for name, layer in linears(self.block).items()}
        inside = {id(p): p.numel() for block in blocks(model) for p in block.parameters()}
        outside = [p for p in unique_tensors(model).values() if id(p) not in inside]
        self.outside_numbers = sum(tensor.numel() for tensor in outside)
        self.all_numbers = self.outside_numbers + sum(inside.values())  # of the dense model
        self.largest_outside = max((tensor.numel() for tensor in outside), default=0)
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.exact = self.kept_bytes == 2 and quantizer(config) is None  # whether what is kept surely takes these bytes
        self._rounded: set[str] = set()  # names of what training leaves in float16
        self._adapters: dict[str, tuple[torch.dtype, torch.Size]] = {}  # of LoRA, by their names in a file of their own
        with made_of(config):
            if quantizer(config) is not None:
                empty_layers(model, config.quantization_config["weights"], dtype)
            self._width = self._embedded(1, 2)[2].shape[2]  # numbers that travel from block to block for a token
            self.forward(1, 2)

    def become(self, config: PreTrainedConfig) -> None:
        """Be the outline of a model of this config from here on: what a dense stage that changes shapes leaves."""
        vars(self).update(vars(MetaModel(config, self.dtype, self.device)))

    def train_norms(self, *, outside: bool = True) -> None:
        """Norms learn, too, without `outside` those of blocks alone; they end as 16 bits have it, of 32 as float16."""
        inside = tuple(f"{name}." for name in block_names(self.model))
        found = {name for name in norms(self.model) if outside or name.startswith(inside)}
        self._rounded |= found if self.dtype.itemsize > 2 else set()

    def add_adapters(self, rank: int) -> float:
        """LoRA adapters of a rank stand beside all compressed layers; returns their numbers."""
        kept = self.dtype if self.dtype.itemsize == 2 else torch.float16
        for name, layer in compressed(self.model).items():
            self._adapters[f"{name}.lora_A.weight"] = kept, torch.Size((rank, layer.in_features))
            self._adapters[f"{name}.lora_B.weight"] = kept, torch.Size((layer.out_features, rank))
        return float(sum(shape.numel() for _, shape in self._adapters.values()))

    def forms(self) -> dict[str, Stored]:
        """The stored forms of all compressed layers, by the layer's name."""
        return {name: layer.stored for name, layer in compressed(self.model).items()}

    @property
    def block(self) -> nn.Module:
        """The block that stands for all: the one with the most numbers."""
        return blocks(self.model)[self._largest]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(blocks(self.model))

    @property
    def hidden(self) -> int:
        """Length of a hidden state."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def compressed(self) -> bool:
        """Whether the blocks' layers are compressed at this point of the run."""
        return bool(compressed(self.model))

    @property
    def outside(self) -> float:
        """Bytes of embedding, head and norm in memory."""
        return self.outside_numbers * self.dtype.itemsize

    @property
    def dense_block(self) -> float:
        """Bytes of a dense block in memory."""
        return self.block_numbers * self.dtype.itemsize

    @property
    def rebuilt(self) -> float:
        """Bytes of a compressed block's dense weights that are kept for several passes."""
        return float(
            self.dtype.itemsize * sum(one.out_features * one.in_features for one in can_stay_rebuilt(self.block))
        )

    @property
    def stored(self) -> float:
        """Bytes of all compressed layers and what else is in the blocks, in memory."""
        tensors = sum(tensor.nbytes for block in blocks(self.model) for tensor in unique_tensors(block).values())
        return float(tensors + sum(layer.stored.decoded_bytes() for layer in compressed(self.model).values()))

    @property
    def in_turn(self) -> dict[str, float]:
        """Bytes of compressed blocks where they are worked at one after the other."""
        if not self.shard:
            return {"codes and codebooks": self.stored}
        most = max(sum(one.nbytes for one in unique_tensors(block).values()) for block in blocks(self.model))
        return {"codes and codebooks of a block": float(most)}

    @property
    def together(self) -> dict[str, float]:
        """Bytes of compressed blocks where all learn together: with `shard` of codes a part, and those of one block.

        Gathered codes are there twice for a moment.
        """
        if not self.shard or self.ranks == 1:
            return {"codes and codebooks": self.stored}
        codes = [float(sum(tensor.nbytes for _, _, tensor in in_parts(block))) for block in blocks(self.model)]
        own = math.ceil(sum(codes) / self.ranks)
        return {"codes and codebooks": self.stored - sum(codes) + own, "codes of a block, gathered": 2 * max(codes)}

    @property
    def in_the_end(self) -> dict[str, float]:
        """Bytes of RAM in which, with `shard`, the first process puts the model together."""
        return {"codes and codebooks": self.stored} if self.shard and self.compressed else {}

    @property
    def writing(self) -> float:
        """Bytes that writing a checkpoint takes beside the model: what is not compressed, in 16 bits."""
        if self.dtype.itemsize == 2:
            return 0.0
        return 2.0 * self.outside_numbers + 6.0 * self.largest_outside

    @property
    def reading(self) -> float:
        """Bytes of mapped files that count as memory while a compressed model is read; on a GPU nothing waits there."""
        if self.device != "cpu":
            return 0.0
        return float(self.checkpoint_bytes()) / (self.blocks if self.shard else 1)

    def places(self) -> list[dict[str, Place]]:
        """The dense linear layers of each block that its forward pass runs, by name: those that are compressed."""
        key = *self._name, "places", tuple(compressed(self.model))
        if key not in _places:
            walk, _, hidden_BTH = self._embedded(1, LOOKED)
            with made_of(self.config):
                _places[key] = observed(walk, hidden_BTH)
        return [dict(block) for block in _places[key]]

    def kept(self) -> list[str]:
        """Names of the matrices and larger tensors inside the blocks that stay as they are (routers, convolutions).

        With * for numbers: one name for all blocks.
        """
        names = block_names(self.model)
        compressed = {f"{name}.{layer}" for name, places in zip(names, self.places()) for layer in places}
        inside = tuple(f"{name}." for name in names)
        found = {
            re.sub(r"\.\d+(?=\.|$)", ".*", name)
            for name, parameter in self.model.named_parameters()
            if parameter.ndim > 1 and name.startswith(inside) and name.rpartition(".")[0] not in compressed
        }
        return sorted(found)

    def codebook_numbers(self, module: nn.Module) -> int:
        """Numbers in the trainable parts of the stored weights of a module, shared ones once."""
        parts = {id(p): p for layer in compressed(module).values() for p in layer.stored.parameters()}
        return sum(part.numel() for part in parts.values())

    def stream(self, windows: int, length: int) -> float:
        """Bytes of the hidden states of some windows."""
        return windows * length * self._width * self.dtype.itemsize

    def part_of_stream(self, windows: int, length: int) -> float:
        """Bytes of the hidden states that are in memory at once where the original's predictions are written."""
        return self.stream(min(windows, max(1, TOKENS_OF_A_PART // length)), length)

    def forward(self, batch: int, length: int) -> Pass:
        """A block's forward pass over some windows, keeping nothing."""
        return self._pass(batch, length, train=False)

    def training(self, batch: int, length: int) -> Pass:
        """A block's forward and backward pass, codebooks in float32; gradients count, AdamW's state does not."""
        return self._pass(batch, length, train=True)

    def logits(self, batch: int, length: int) -> Pass:
        """The head over a batch, and the log-likelihood of one window at a time."""
        rows = length * self.vocabulary
        peak = batch * rows * self.dtype.itemsize + rows * (4.0 if self.dtype.itemsize == 4 else 8.0)
        flops = 2.0 * batch * rows * self.hidden
        return Pass(peak, Work(flops=flops, traffic=4 * peak))

    def _pass(self, batch: int, length: int, *, train: bool) -> Pass:
        forms = {name: described(layer.stored) for name, layer in compressed(self.block).items()}
        key = *self._name, repr(forms), batch, length, train
        if key not in _passes:
            _passes[key] = self._walk(batch, length, train)
        return _passes[key]

    def _embedded(self, batch: int, length: int) -> tuple[Walk, nn.Module, Tensor]:
        walk = self._walked
        with Count(), chosen_all():
            return walk, self.block, walk.embed(torch.zeros(batch, length, dtype=torch.long, device="meta"))

    def _walk(self, batch: int, length: int, train: bool) -> Pass:
        walk, block, hidden_BTH = self._embedded(batch, length)
        index = walk.blocks.index(block)
        states = [(layer.stored, layer.stored.state_dict()) for layer in compressed(block).values() if train]
        dense = list(block.parameters()) if train and not compressed(block) else []  # the whole original learns
        if train:
            for stored, _ in states:
                stored.to_masters()
            for parameter in dense:
                parameter.requires_grad_(True)
        target_BTH = torch.empty_like(hidden_BTH)
        with ExitStack() as stack:
            count = stack.enter_context(Count())
            stack.enter_context(FusedAttention(count))
            stack.enter_context(chosen_all())
            stack.enter_context(torch.set_grad_enabled(train))
            output_BTH = walk.apply(index, block, hidden_BTH)
            if train:
                F.mse_loss(output_BTH.float(), target_BTH.float()).backward()
        for stored, state in states:
            stored.restore(state)
        for parameter in dense:
            parameter.requires_grad_(False)
            parameter.grad = None
        return Pass(count.peak, count.work)

    def size(self) -> Size:
        """The ledger as it will be."""
        found = size_of(self.model, kept_bits=8 * self.kept_bytes)
        return with_adapters(found, sum(16 * shape.numel() for _, shape in self._adapters.values()))

    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoint's weight files, headers included."""
        kept, inside = torch.float32 if self.kept_bytes == 4 else torch.bfloat16, parts_of_stored(self.model)

        def dtype(name: str, tensor: Tensor) -> torch.dtype:
            if inside(name):
                return tensor.dtype
            return torch.float16 if name in self._rounded else kept if tensor.numel() else torch.bfloat16

        tensors = unique_tensors(self.model).items()
        bytes_ = file_bytes({name: (dtype(name, one), one.shape) for name, one in tensors})
        return bytes_ + (file_bytes(self._adapters) if self._adapters else 0)

    def end_to_end(
        self,
        *,
        together: int,
        of_a_step: int,
        length: int,
        examples: int,
        held_out: int,
        trained: float,
        state: float,
        logits: int,
        again: bool,
        before: Work = NOTHING,
    ) -> Cost:
        """Training of the whole model: all inputs of blocks are kept, and their insides, or these are made `again`.

        `together`: examples that go through the model together. `state`: bytes of the `trained` numbers and of what is
        kept of each. `logits`: numbers of them that are in memory at once.
        """
        inside, can = self.training(together, length), self.model.supports_gradient_checkpointing
        again = again and can
        dense = {"dense blocks": self.all_numbers * self.dtype.itemsize - self.outside}
        device = (self.together if self.compressed else dense) | {
            "embedding, head": self.outside,
            "masters, gradients, AdamW's state": state,
            "inputs of all blocks": self.blocks * self.stream(together, length),
            **({"inside one block": inside.peak} if again else {"inside all blocks": self.blocks * inside.peak}),
            "logits": 12.0 * logits,
        }
        once = self.forward(together, length).work * self.blocks
        head = self.logits(together, length).work
        passes = examples / (together * self.ranks)
        work = (inside.work * self.blocks + (once if again else NOTHING) + head * 3) * passes
        work += Work(traffic=40.0 * trained) * (examples / of_a_step)
        work += (once + head) * (2 * held_out / together) + before * (1 / self.ranks)
        work += Work(read=float(self.checkpoint_bytes()))
        relief = "a smaller length" + (", or a smaller batch_size with more accumulation" if together > 1 else "")
        relief += ", or gradient_checkpointing=true" if can and not again else ""
        if self.device == "cpu":
            return Cost(worst(device, self.in_the_end | {"embedding, head": self.outside}), {}, work, relief)
        return Cost(device, self.in_the_end, work, relief)
