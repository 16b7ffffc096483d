"""Whether a model can be walked block by block: its own forward pass beside what a walk relies on."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cluscomp.errors import InputError
from cluscomp.models.arguments import Arguments, Handed, Layout, Manner, carry, differing, hidden_of, same, split
from cluscomp.models.original import block_names
from cluscomp.models.sources import no_causal_model

if TYPE_CHECKING:
    from cluscomp.models.walk import Walk


class Captured(Exception):
    """Ends a forward pass once what was to be seen is known."""


@torch.no_grad()
def compare(walk: "Walk", ids_1T: Int[Tensor, "1 T"]) -> None:
    """Let the model itself run on a window (1, T), and one that ends otherwise, and compare what passes between blocks.

    It is what a walk relies on: with the arguments found with all blocks skipped each block gives what it gives in
    the model, its output is what enters the next, and norm and head make of the last what the model does. Raises
    InputError where it is not so. Without numbers it only finds out what blocks get and give.
    """
    half = ids_1T.shape[1] // 2
    ids_BT = torch.cat([ids_1T, torch.cat([ids_1T[:, :half], ids_1T.flip(1)[:, half:]], 1)])
    if not _begun(walk, ids_BT):
        return
    hidden_BTH, found = walk.capture(ids_BT)
    if (own := _own(walk, ids_BT, hidden_BTH, found)) is None:
        return
    logits_BTV, last_BTH, handed = own
    if _far(logits_BTV[0, :half], logits_BTV[1, :half]):  # what comes later has a say
        raise no_causal_model(type(walk.model).__name__)
    (one_1TH, first), (_, second) = (walk.capture(one_1T) for one_1T in ids_BT.split(1))
    of_tokens = frozenset[int | str]().union(*map(differing, first, second))
    width = one_1TH.shape[2] if of_tokens or handed else None
    manner = replace(walk.manner, carried=of_tokens, handed=handed, width=width)
    try:
        carry(one_1TH, first, manner)
    except ValueError as error:
        raise _not_walkable(walk, f"{error} is made of the tokens, and is not like the hidden states") from error
    if _far(walk.logits(last_BTH, ids_BT), logits_BTV):
        raise _not_walkable(walk, "its logits are then others")
    walk.found = manner
    if walk.original is not None:
        walk.original.manner = manner


def _begun(walk: "Walk", ids_BT: Tensor) -> bool:
    """Run the first block, and see what it gets and gives; whether there are numbers in it."""
    found: list[Tensor] = []

    def leave(_block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entering, _ = split(args, kwargs)
        layout = Layout.of(entering, ids_BT.shape)
        if layout is None:
            raise _not_walkable(walk, f"{block_names(walk.model)[0]} gets hidden states {tuple(entering.shape)}")
        walk.found = Manner(len(output) if isinstance(output, tuple | list) else 0, layout)
        found.append(hidden_of(output))
        raise Captured

    with _in_order(walk), walk.block(0):
        handle = walk.blocks[0].register_forward_hook(leave, with_kwargs=True)
        try:
            walk.model(ids_BT, use_cache=False)
        except Captured:
            return not found[0].is_meta
        finally:
            handle.remove()
    raise _not_walkable(walk, "none was called")


def _own(
    walk: "Walk", ids_BT: Tensor, first_BTH: Tensor, found: list[Arguments]
) -> tuple[Tensor, Tensor, tuple[Handed, ...]] | None:
    """The model's own forward pass: logits, what the last block gives, what blocks hand to the next.

    None where numbers are not finite.

    Raises InputError where the first block does not get these hidden states, or one gives something else with the
    arguments that were found.
    """
    entered: list[Arguments] = []
    left = [first_BTH]  # by the blocks so far
    handed: dict[int | str, Handed] = {}
    given: list[Any] = [()]  # by the block before
    names, here = block_names(walk.model), ExitStack()

    def enter(_block: nn.Module, args: Any, kwargs: Any) -> None:
        index = len(entered)
        entering, arguments = split(args, kwargs)
        if not torch.equal(left[-1], walk.manner.layout.flat(entering)):
            before = "what the block before it gives" if index else "what enters when blocks are skipped"
            raise _not_walkable(walk, f"what enters {names[index]} is not {before}")
        entered.append(arguments)
        handed.update(Handed.among(arguments, given[0], left[-1]))
        here.enter_context(walk.block(index))

    def leave(block: nn.Module, _args: Any, output: Any) -> None:
        index = len(entered) - 1
        output_BTH = walk.manner.layout.flat(hidden_of(output)).clone()
        if not bool(output_BTH.isfinite().all()):
            raise Captured
        own = entered[index].places()
        notes = {place: copy(one) for place, one in found[index].places().items() if isinstance(one, Mapping)}
        arguments = found[index].changed(notes | {place: own[place] for place in handed})
        alike = same(entered[index], arguments)
        other = f"{names[index]} gets other arguments than with the blocks before it skipped"
        try:
            again_BTH, _ = walk.run(block.forward, left[-1], arguments)
        except Exception as error:  # whatever a block makes of arguments that are not its own
            raise error if alike else _not_walkable(walk, other) from error
        if not alike and not torch.equal(again_BTH, output_BTH):
            raise _not_walkable(walk, other)
        if _far(again_BTH, output_BTH):
            raise _not_walkable(walk, f"{names[index]} gives something else when it is run again")
        left.append(output_BTH)
        given[0] = output
        here.close()

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in walk.blocks]
    handles += [block.register_forward_hook(leave) for block in walk.blocks]
    try:
        with here, _in_order(walk):
            logits_BTV: Tensor = walk.model(ids_BT, use_cache=False).logits
    except Captured:
        return None
    finally:
        for handle in handles:
            handle.remove()
    if len(entered) < len(names):
        raise _not_walkable(walk, f"{len(entered)} of {len(names)} were called")
    return None if bool(logits_BTV.isnan().any()) else (logits_BTV, left[-1], (*handed.values(),))


@contextmanager
def _in_order(walk: "Walk") -> Iterator[None]:
    """Raise InputError where blocks are not called one after the other, before one is run."""
    coming = iter(walk.blocks)

    def enter(block: nn.Module, _args: Any) -> None:
        if block is not next(coming, None):
            raise _not_walkable(walk, "they are not called one after the other")

    handles = [block.register_forward_pre_hook(enter, prepend=True) for block in walk.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _not_walkable(walk: "Walk", reason: str) -> InputError:
    return InputError(f"{type(walk.model).__name__}: its blocks cannot be walked one by one: {reason}")


def _far(found: Tensor, expected: Tensor) -> bool:
    """Whether logits of any shape differ by more than rounding."""
    if torch.equal(found, expected):
        return False
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    return not float(difference) <= torch.finfo(expected.dtype).eps ** 0.5
