"""Walk a decoder block by block with exact activations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluscomp.errors import InputError
from cluscomp.forms.linear import rebuilt
from cluscomp.models.arguments import Arguments, Carried, Manner, behind, carry, hidden_of, same, split
from cluscomp.models.comparing import Captured, compare
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.process import give_memory_back, told

CHECKED_TOKENS = 32  # of the window on which a walk is compared with the model


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
        self.model, self.blocks, self.original = model, blocks(model), original
        self._arguments: dict[torch.Size, list[Arguments]] = {}
        self.found: Manner | None = None if original is None else original.manner  # None: not compared yet

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def width(self) -> int | None:
        """Numbers of a hidden state, where others travel behind it."""
        return None if self.found is None else self.found.width

    def __len__(self) -> int:
        return len(self.blocks)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index`, in memory for the length of a `with` block."""
        if self.original is None:
            yield self.blocks[index]
            give_memory_back()
        else:
            with self.original.block(self.model, index) as block:
                yield block

    @torch.no_grad()
    def embed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B P H"]:
        """The hidden states that enter the first block: (B, T) token ids -> (B, P, H); P = T where no more are added.

        Several streams of them are one row. Raises InputError for a model whose blocks get arguments that are made of
        the tokens and cannot travel, or that does something else between its blocks.
        """
        if self.found is None:
            compare(self, ids_BT[:1, :CHECKED_TOKENS])
        hidden_BTH, arguments = carry(*self.capture(ids_BT), self.manner)
        known = self._arguments.setdefault(hidden_BTH.shape[:2], arguments)
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
            return self.run(block, hidden_BTH, arguments)[0]
        carried = {place: one.of(hidden_BTH) for place, one in arguments.places().items() if isinstance(one, Carried)}
        output_BTH, given = self.run(block, hidden_BTH[..., : self.width], arguments.changed(carried))
        return torch.cat([output_BTH, *behind(hidden_BTH[..., self.width :], given, self.manner.handed)], -1)

    @torch.no_grad()
    def through(
        self, batches: list[Tensor], label: str, look: Callable[[int, Tensor], None] | None = None
    ) -> list[Tensor]:
        """What the last block makes of each batch of windows, (B, T) -> (B, T, H); one block is in memory at a time.

        `look` is shown what each block makes of each batch: its index and (B, T, H). Raises InputError that names the
        first block whose output is not finite.
        """
        hidden = [self.embed(ids_BT) for ids_BT in batches]
        for index in told(range(len(self)), len(self), label, "block"):
            with self.block(index) as block, rebuilt(block, self.model.dtype):
                for number, hidden_BTH in enumerate(hidden):
                    hidden[number] = self.apply(index, block, hidden_BTH)
                    _check_finite(block_names(self.model)[index], block, hidden[number])
                    if look is not None:
                        look(index, hidden[number])
        return hidden

    @torch.no_grad()
    def observe(
        self, index: int, block: nn.Module, hidden_BTH: Float[Tensor, "B T H"], layers: list[str]
    ) -> tuple[Float[Tensor, "B T H"], dict[str, Tensor]]:
        """`apply`, and what enters the named layers of the block: (B, T, H) and (..., I) by name.

        Layers with one input (query, key, value) get the same tensor. Layers that nothing enters, experts that no
        token is sent to, say, are not among them.
        """
        with _noted(block, layers) as entering:
            return self.apply(index, block, hidden_BTH), entering

    @torch.no_grad()
    def entering(
        self, index: int, block: nn.Module, hidden_BTH: Float[Tensor, "B T H"], layers: list[str]
    ) -> dict[str, Tensor]:
        """What enters the named layers alone, (..., I) by name as in `observe`, of hidden states (B, T, H).

        The block goes no further than to the last of them.
        """
        with suppress(Captured), _noted(block, layers, stop=True) as entering:
            self.apply(index, block, hidden_BTH)
        return entering

    def logits(self, hidden_BTH: Float[Tensor, "B P H"], ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T vocabulary"]:
        """What the model makes of the last block's output (B, T, H), by its final norm and head: (B, T, vocabulary)."""

        if self.found is None:  # of a model whose hidden states were kept by another process
            compare(self, ids_BT[:1, :CHECKED_TOKENS])

        def put(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> Any:
            return self._given(self.manner.layout.own(hidden_BTH[..., : self.width]))

        with self._skipped_blocks(lambda index: put if index == len(self.blocks) - 1 else None):
            return self.model(ids_BT, use_cache=False).logits  # type: ignore[no-any-return]

    @property
    def manner(self) -> Manner:
        """How blocks are called, known once `compare` was run."""
        assert self.found is not None
        return self.found

    def run(self, block: Callable[..., Any], hidden_BTH: Tensor, arguments: Arguments) -> tuple[Tensor, Any]:
        """The hidden states (B, P, H) that a block makes of others (B, P, H), and all that it gives."""
        layout = self.manner.layout
        given = block(layout.own(hidden_BTH), *arguments.args, **arguments.kwargs)
        return layout.flat(hidden_of(given)), given

    def _given(self, hidden: Tensor) -> Any:
        """Hidden states as a block gives them: alone, or first in a tuple of so many, of which the others are None."""
        return (hidden, *[None] * (self.manner.gives - 1)) if self.manner.gives else hidden

    def capture(self, ids_BT: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The hidden states (B, P, H) that enter the first block, and what each is called with, all being skipped.

        `ids_BT`: token ids (B, T).
        """
        arguments: list[Arguments] = []
        entering: list[Tensor] = []

        def note(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            hidden, others = split(args, kwargs)
            entering.append(self.manner.layout.flat(hidden))
            arguments.append(others)
            if len(arguments) == len(self.blocks):
                raise Captured

        with self._skipped_blocks(lambda _index: note):
            try:
                self.model(ids_BT, use_cache=False)
            except Captured:
                return entering[0], arguments
        raise InputError(f"{type(self.model).__name__}: {len(arguments)} of {len(self.blocks)} blocks were called")

    @contextmanager
    def _skipped_blocks(self, hook_of: Callable[[int], Callable[..., Any] | None]) -> Iterator[None]:
        """Let every block hand on its input unchanged; `hook_of(index)` may look at a call or replace its output."""
        handles = []
        try:
            for index, block in enumerate(self.blocks):
                block.forward = lambda *args, **kwargs: self._given(split(args, kwargs)[0])
                if hook := hook_of(index):
                    handles.append(block.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                vars(block).pop("forward", None)  # the class's own forward shows again


@contextmanager
def _noted(block: nn.Module, layers: list[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """What enters the named layers of a block (..., I) while it runs; with `stop` it ends as `Captured` at the last.

    Of a layer that is called more than once the call with the most tokens is kept.
    """
    entering: dict[str, Tensor] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in entering or inputs[0].numel() >= entering[name].numel():
            entering[name] = inputs[0]
        if stop and len(entering) == len(layers):
            raise Captured

    handles = [block.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in layers]
    try:
        yield entering
    finally:
        for handle in handles:
            handle.remove()


def not_finite(place: str, dtype: torch.dtype) -> InputError:
    """What is told of the first place in a model, a block or its head, from which its numbers are no numbers."""
    kind = str(dtype).removeprefix("torch.")
    return InputError(
        f"{place}: NaN or infinity in what it makes of the text, so there is no score; the model is damaged, or its "
        f"numbers are too large for {kind}{'' if kind == 'float32' else ' (dtype=float32 holds larger ones)'}"
    )


def _check_finite(name: str, block: nn.Module, hidden_BTH: Tensor) -> None:
    if not bool(hidden_BTH.isfinite().all()):
        for key, parameter in block.named_parameters():
            if not bool(parameter.float().isfinite().all()):
                raise InputError(f"{name}.{key}: NaN or infinity among its numbers; the model is damaged")
        raise not_finite(name, hidden_BTH.dtype)
