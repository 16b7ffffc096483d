"""Walk a decoder block by block with exact activations (the only place with hooks)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.errors import InputError
from cluscomp.forms.linear import rebuilt
from cluscomp.models.arguments import Arguments, Carried, carry, differing, same, split
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.models.sources import no_causal_model
from cluscomp.process import give_memory_back, told

CHECKED_TOKENS = 32  # of the window on which a walk is compared with the model


class _Captured(Exception):
    """Ends a forward pass once every block's arguments are known."""


@dataclass(frozen=True)
class Manner:
    """How a model's blocks are called: they give a tuple of so many things (0: none), the first the hidden states.

    Arguments at the places `carried` (a position or a name) are made of the tokens.
    """

    gives: int
    carried: frozenset[int | str] = frozenset()


class Walk:
    """The forward pass of a model, cut at its blocks.

    Every block gets its own captured arguments: models whose blocks differ (sliding windows, two rotary bases) are
    silently wrong with block 0's. Arguments that are made of the tokens of a window travel behind the hidden states,
    which are the first `width` numbers then; all others depend on its shape alone, which is checked. Windows must have
    one length and no padding. With `original` the blocks' weights are read from its file, one block at a time; without,
    they are in the model. Before the first window the walk is compared with the model's own forward pass, that of an
    original once.
    """

    def __init__(self, model: PreTrainedModel, original: Original | None = None) -> None:
        self.model, self.blocks, self._original = model, blocks(model), original
        self._arguments: dict[torch.Size, list[Arguments]] = {}
        self._manner: Manner | None = None if original is None else original.manner  # None: not compared yet
        self.width: int | None = None  # numbers of a hidden state, where others travel behind it

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

        Raises InputError for a model whose blocks get arguments made from the tokens, or more than one stream, or that
        does something else between its blocks.
        """
        if self._manner is None:
            self._compare(ids_BT[:1, :CHECKED_TOKENS])
        hidden_BTH, arguments = self._capture(ids_BT)
        if self._manner is not None and self._manner.carried:
            self.width = hidden_BTH.shape[2]
            hidden_BTH, arguments = carry(hidden_BTH, arguments, self._manner.carried)
        known = self._arguments.setdefault(ids_BT.shape, arguments)
        for name, first, second in zip(block_names(self.model), known, arguments):
            if not same(first, second):
                raise InputError(f"{name}: its arguments depend on the tokens, so blocks cannot be walked one by one")
        return hidden_BTH

    def apply(
        self, index: int, block: Callable[..., Any], hidden_BTH: Float[Tensor, "B T H"]
    ) -> Float[Tensor, "B T H"]:
        """Run `block` as block `index`: (B, T, H) -> (B, T, H); windows of this shape were embedded before."""
        arguments = self._arguments[hidden_BTH.shape[:2]][index]
        if self.width is None:
            return _hidden(block(hidden_BTH, *arguments.args, **arguments.kwargs))
        carried = {place: one.of(hidden_BTH) for place, one in arguments.places().items() if isinstance(one, Carried)}
        arguments = arguments.changed(carried)
        output = _hidden(block(hidden_BTH[..., : self.width], *arguments.args, **arguments.kwargs))
        return torch.cat([output, hidden_BTH[..., self.width :]], -1)

    @torch.no_grad()
    def through(self, batches: list[Tensor], label: str) -> list[Tensor]:
        """What the last block makes of each batch of windows, (B, T) -> (B, T, H); one block is in memory at a time.

        Raises InputError that names the first block whose output is not finite.
        """
        hidden = [self.embed(ids_BT) for ids_BT in batches]
        for index in told(range(len(self)), len(self), label, "block"):
            with self.block(index) as block, rebuilt(block, self.model.dtype):
                for number, hidden_BTH in enumerate(hidden):
                    hidden[number] = self.apply(index, block, hidden_BTH)
                    _check_finite(block_names(self.model)[index], block, hidden[number])
        return hidden

    @torch.no_grad()
    def observe(
        self, index: int, block: nn.Module, hidden_BTH: Float[Tensor, "B T H"], layers: list[str]
    ) -> tuple[Float[Tensor, "B T H"], dict[str, Tensor]]:
        """`apply`, and what enters the named layers of the block: (B, T, H) and (..., I) by name.

        Layers with one input (query, key, value) get the same tensor. Layers that nothing enters, experts that no
        token is sent to, say, are not among them.
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

    def logits(self, hidden_BTH: Float[Tensor, "B T H"], ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T vocabulary"]:
        """What the model makes of the last block's output (B, T, H), by its final norm and head: (B, T, vocabulary)."""

        def replace(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> Any:
            return _given(hidden_BTH[..., : self.width], self._manner)

        with self._skipped_blocks(lambda index: replace if index == len(self.blocks) - 1 else None):
            return self.model(ids_BT, use_cache=False).logits  # type: ignore[no-any-return]

    def _compare(self, ids_1T: Int[Tensor, "1 T"]) -> None:
        """Let the model itself run on a window, and one that ends otherwise, and compare what passes between blocks.

        It is what a walk relies on: the arguments found with all blocks skipped are those that each block gets, its
        output is what enters the next, and norm and head make of the last what the model does. Without numbers (on the
        meta device, or where they are NaN) it only finds out what blocks give. Raises InputError where it is not so.
        """
        half, names = ids_1T.shape[1] // 2, block_names(self.model)
        ids_BT = torch.cat([ids_1T, torch.cat([ids_1T[:, :half], ids_1T.flip(1)[:, half:]], 1)])
        logits_BTV, calls, last_BTH = self._own(ids_BT)
        if logits_BTV is None:
            return
        if _far(logits_BTV[0, :half], logits_BTV[1, :half]):  # what comes later has a say
            raise no_causal_model(type(self.model).__name__)
        (one_1TH, first), (_, second) = (self._capture(one_1T) for one_1T in ids_BT.split(1))
        of_tokens = frozenset[int | str]().union(*map(differing, first, second))
        try:
            carry(one_1TH, first, of_tokens)
        except ValueError as error:
            raise self._not_walkable(f"{error} is made of the tokens, and is not like the hidden states") from error
        hidden_BTH, found = self._capture(ids_BT)
        for name, (_, own), arguments in zip(names, calls, found):
            if not same(own, arguments):
                raise self._not_walkable(f"{name} gets other arguments than with the blocks before it skipped")
        if not torch.equal(hidden_BTH, calls[0][0]):
            raise self._not_walkable("other hidden states enter the first block when blocks are skipped")
        walked_BTV = self.logits(last_BTH, ids_BT)
        if _far(walked_BTV, logits_BTV):
            raise self._not_walkable("its logits are then others")
        assert self._manner is not None  # _own
        self._manner = Manner(self._manner.gives, of_tokens)
        if self._original is not None:
            self._original.manner = self._manner

    def _own(self, ids_BT: Tensor) -> tuple[Tensor | None, list[tuple[Tensor, Arguments]], Tensor]:
        """The model's own forward pass: logits, what each block is called with, and what the last one gives.

        Logits are None for a model without numbers, of which only the first block is run, and where they or the hidden
        states are not finite.
        """
        calls: list[tuple[Tensor, Arguments]] = []
        left: list[Tensor] = []  # by the blocks so far
        names, here = block_names(self.model), ExitStack()

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            index = len(calls)
            entering, arguments = split(args, kwargs)
            if entering.ndim != 3:
                raise self._not_walkable(f"{names[0]} gets hidden states of shape {tuple(entering.shape)}")
            if index == len(names) or block is not self.blocks[index]:
                raise self._not_walkable("they are not called one after the other")
            if left and not torch.equal(left[-1], entering):
                raise self._not_walkable(f"what enters {names[index]} is not what the block before it gives")
            calls.append((entering.clone(), arguments))
            here.enter_context(self.block(index))

        def leave(block: nn.Module, _args: Any, output: Any) -> None:
            self._manner = Manner(len(output) if isinstance(output, tuple | list) else 0)
            left.append(_hidden(output).clone())
            if left[-1].is_meta or not bool(left[-1].isfinite().all()):
                raise _Captured
            entering, arguments = calls[-1]
            again_BTH = _hidden(block.forward(entering, *arguments.args, **arguments.kwargs))
            if _far(again_BTH, left[-1]):
                raise self._not_walkable(f"{names[len(calls) - 1]} gives something else when it is run again")
            here.close()

        handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in self.blocks]
        handles += [block.register_forward_hook(leave) for block in self.blocks]
        try:
            with here:
                logits_BTV: Tensor = self.model(ids_BT, use_cache=False).logits
            if len(left) < len(names):
                raise self._not_walkable(f"{len(left)} of {len(names)} were called")
            return None if bool(logits_BTV.isnan().any()) else logits_BTV, calls, left[-1]
        except _Captured:
            return None, calls, left[-1]
        finally:
            for handle in handles:
                handle.remove()

    def _not_walkable(self, reason: str) -> InputError:
        return InputError(f"{type(self.model).__name__}: its blocks cannot be walked one by one: {reason}")

    def _capture(self, ids_BT: Tensor) -> tuple[Tensor, list[Arguments]]:
        arguments: list[Arguments] = []
        entering: list[Tensor] = []

        def note(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            hidden, others = split(args, kwargs)
            entering.append(hidden)
            arguments.append(others)
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
                block.forward = partial(_skipped, self._manner)
                if hook := hook_of(index):
                    handles.append(block.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                vars(block).pop("forward", None)  # the class's own forward shows again


def not_finite(place: str, dtype: torch.dtype) -> InputError:
    """What is told of the first place in a model, a block or its head, from which its numbers are no numbers."""
    kind = str(dtype).removeprefix("torch.")
    return InputError(
        f"{place}: NaN or infinity in what it makes of the text, so there is no score; the model is damaged, or its "
        f"numbers are too large for {kind}{'' if kind == 'float32' else ' (dtype=float32 holds larger ones)'}"
    )


def _skipped(manner: Manner | None, *args: Any, **kwargs: Any) -> Any:
    """What a block that hands on its input gives."""
    return _given(split(args, kwargs)[0], manner)


def _given(hidden_BTH: Tensor, manner: Manner | None) -> Any:
    """Hidden states as a block gives them: alone, or first in a tuple of so many, of which the others are None."""
    return (hidden_BTH, *[None] * (manner.gives - 1)) if manner and manner.gives else hidden_BTH


def _far(found: Tensor, expected: Tensor) -> bool:
    """Whether logits of any shape differ by more than rounding."""
    if torch.equal(found, expected):
        return False
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    return not float(difference) <= torch.finfo(expected.dtype).eps ** 0.5


def _check_finite(name: str, block: nn.Module, hidden_BTH: Tensor) -> None:
    if not bool(hidden_BTH.isfinite().all()):
        for key, parameter in block.named_parameters():
            if not bool(parameter.float().isfinite().all()):
                raise InputError(f"{name}.{key}: NaN or infinity among its numbers; the model is damaged")
        raise not_finite(name, hidden_BTH.dtype)


def _hidden(output: Any) -> Tensor:
    """The hidden states in what a block gives."""
    return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]
