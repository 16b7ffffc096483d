"""Walk a decoder block by block with exact activations (the only place with hooks)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from cluscomp.errors import InputError
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.process import give_memory_back


class _Captured(Exception):
    """Ends a forward pass once every block's arguments are known."""


@dataclass(frozen=True)
class Arguments:
    """What one block is called with besides the hidden states: masks, position embeddings, ..."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Walk:
    """The forward pass of a model, cut at its blocks.

    Every block gets its own captured arguments: models whose blocks differ (sliding windows, two rotary bases) are
    silently wrong with block 0's. The arguments may depend on the shape of a window but not on its tokens, which is
    checked; windows must have one length and no padding. With `original` the blocks' weights are read from its file,
    one block at a time; without, they are in the model.
    """

    def __init__(self, model: PreTrainedModel, original: Original | None = None) -> None:
        self.model, self.blocks, self._original = model, blocks(model), original
        self._arguments: dict[torch.Size, list[Arguments]] = {}

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return next(self.model.get_input_embeddings().parameters()).device

    def __len__(self) -> int:
        return len(self.blocks)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index`, in memory for the length of a `with` block."""
        if self._original is None:
            yield self.blocks[index]
            give_memory_back()
        else:
            with self._original.block(self.model, index) as block:
                yield block

    @torch.no_grad()
    def embed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """The hidden states that enter the first block: (B, T) token ids -> (B, T, H).

        Raises InputError for a model whose blocks get arguments made from the tokens, or more than one stream.
        """
        hidden_BTH, arguments = self._capture(ids_BT)
        if hidden_BTH.ndim != 3:
            shape = tuple(hidden_BTH.shape)
            raise InputError(
                f"{type(self.model).__name__}: hidden states of shape {shape}; its blocks cannot be walked"
            )
        known = self._arguments.setdefault(ids_BT.shape, arguments)
        for name, first, second in zip(block_names(self.model), known, arguments):
            if not _same(first, second):
                raise InputError(f"{name}: its arguments depend on the tokens, so blocks cannot be walked one by one")
        return hidden_BTH

    def apply(
        self, index: int, block: Callable[..., Any], hidden_BTH: Float[Tensor, "B T H"]
    ) -> Float[Tensor, "B T H"]:
        """Run `block` as block `index`: (B, T, H) -> (B, T, H); windows of this shape were embedded before."""
        arguments = self._arguments[hidden_BTH.shape[:2]][index]
        output = block(hidden_BTH, *arguments.args, **arguments.kwargs)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    @torch.no_grad()
    def through(self, batches: list[Tensor], label: str) -> list[Tensor]:
        """What the last block makes of each batch of windows, (B, T) -> (B, T, H); one block is in memory at a time."""
        hidden = [self.embed(ids_BT) for ids_BT in batches]
        for index in tqdm(range(len(self)), desc=label, unit="block", leave=False, disable=None):
            with self.block(index) as block:
                for number, hidden_BTH in enumerate(hidden):
                    hidden[number] = self.apply(index, block, hidden_BTH)
        return hidden

    @torch.no_grad()
    def observe(
        self, index: int, block: nn.Module, hidden_BTH: Float[Tensor, "B T H"], layers: list[str]
    ) -> tuple[Float[Tensor, "B T H"], dict[str, Tensor]]:
        """`apply`, and what enters the named layers of the block: (B, T, H) and (..., I) by name.

        Layers with one input (query, key, value) get the same tensor.
        """
        entering: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, args: entering.update({name: args[0]})

        handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
        try:
            return self.apply(index, block, hidden_BTH), entering
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def logits(self, hidden_BTH: Float[Tensor, "B T H"], ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T vocabulary"]:
        """What the model makes of the last block's output (B, T, H), by its final norm and head: (B, T, vocabulary)."""

        def replace(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> Tensor:
            return hidden_BTH

        with self._skipped_blocks(lambda index: replace if index == len(self.blocks) - 1 else None):
            return self.model(ids_BT, use_cache=False).logits  # type: ignore[no-any-return]

    def _capture(self, ids_BT: Tensor) -> tuple[Tensor, list[Arguments]]:
        arguments: list[Arguments] = []
        entering: list[Tensor] = []

        def note(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            entering.append(hidden)
            arguments.append(Arguments(tuple(args[1:]), kwargs))
            if len(arguments) == len(self.blocks):
                raise _Captured

        with self._skipped_blocks(lambda _index: note):
            try:
                self.model(ids_BT, use_cache=False)
            except _Captured:
                return entering[0], arguments
        raise InputError(f"{type(self.model).__name__}: {len(arguments)} of {len(self.blocks)} blocks were called")

    @contextmanager
    def _skipped_blocks(self, hook_of: Callable[[int], Callable[..., Any] | None]) -> Iterator[None]:
        """Let every block hand on its input unchanged; `hook_of(index)` may look at a call or replace its output."""
        handles = []
        try:
            for index, block in enumerate(self.blocks):
                block.forward = _identity
                if hook := hook_of(index):
                    handles.append(block.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                vars(block).pop("forward", None)  # the class's own forward shows again


def _identity(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states


def _same(first: Any, second: Any) -> bool:
    """Whether two blocks' arguments are equal, tensors by value."""
    if isinstance(first, Tensor):
        return first is second or (isinstance(second, Tensor) and torch.equal(first, second))
    if isinstance(first, Arguments):
        return isinstance(second, Arguments) and _same(first.args, second.args) and _same(first.kwargs, second.kwargs)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(_same(one, two) for one, two in zip(first, second))
    return bool(first == second)
