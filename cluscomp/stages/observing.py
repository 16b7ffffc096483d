"""What stage cluster sees of the layers' inputs, and how weights follow what compressed blocks do to them."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import inf
from typing import Any

import torch
from torch import Tensor

from cluscomp.forms.apart import stacks
from cluscomp.models.original import linears
from cluscomp.models.walk import Walk
from cluscomp.plan.places import Place
from cluscomp.solve.allocate import Option
from cluscomp.solve.layer import Later, Seen

LEAST = 256  # tokens of the calibration text, that an expert's statistics stand on


@dataclass(frozen=True)
class Following:
    """How the weights of a block follow the drift of their inputs; see `Cluster`."""

    strength: float
    damping: float
    again: Callable[..., tuple[list[Tensor], dict[str, Seen]]]  # `observe`, of the layers that come next


def seen_first(places: dict[str, Place], share: list[tuple[list[str], Option]] | None) -> list[str]:
    """The layers of a block whose inputs are looked at before any is compressed, if those of others are seen again.

    Those of the first input, where bits were shared out before and inputs come one after the other; else all.
    """
    inputs = [place.input for place in places.values()]
    made = [places[layer].input for names, _ in share or () for layer in names]
    one_by_one = [number for number, _ in groupby(made)] == [*dict.fromkeys(inputs)]
    if not one_by_one or any(place.stack for place in places.values()):
        return [*places]
    return [layer for layer, place in places.items() if place.input == inputs[0]]


def through(
    walk: Walk, index: int, entering: list[Tensor], *, keep: bool = True
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What a dense block makes of its inputs (batches of (B, T, H)), and with `keep` what enters its linear layers."""
    block = walk.blocks[index]
    layers = list(linears(block)) if keep else []
    found = [walk.observe(index, block, hidden_BTH, layers) for hidden_BTH in entering]
    return [output_BTH for output_BTH, _ in found], [inputs for _, inputs in found]


def observe(
    sees: frozenset[str],
    walk: Walk,
    index: int,
    entering: Sequence[Tensor],
    *,
    layers: list[str],
    originals: list[dict[str, Tensor]] | None = None,
    room: float = inf,
    whole: bool = True,
    give: Callable[[Tensor], None] | None = None,
) -> tuple[list[Tensor], dict[str, Seen]]:
    """What a block makes of its inputs (batches of (B, T, H)), nothing if not `whole`, and named layers' statistics.

    Layers with one input share their statistics. `originals`: what enters the layers in the original, by batch; of
    experts it may be other tokens, and is not looked at. An expert that saw less than `LEAST` tokens has its statistics
    mixed with the mean of its stack's; one that saw none has those that are assumed without data. Of experts as many
    statistics are in memory at once as have `room` (bytes): the others are gathered when they are asked for, in passes
    of their own through the block, which must compute then as it does now. `give` is called with each output at once.
    """
    block = walk.blocks[index]
    asked = set(layers)
    stack_of = {layer: name for name, stack in stacks(block).items() for layer in stack if layer in asked}
    modules: dict[str, Any] = {layer: block.get_submodule(layer) for layer in stack_of}
    turns = in_turn({layer: module.in_features for layer, module in modules.items()}, sees, room)
    gather = partial(_gathered, sees, walk, index, entering, stack_of, originals, give)
    dense = [layer for layer in layers if layer not in stack_of]
    stream, found = gather(dense + (turns[0] if turns else []), whole=whole)
    statistics = {layer: found[layer] for layer in dense if layer in found}
    own, together = dict.fromkeys(stack_of, 0), dict[str, Seen]()  # of each expert, of each stack
    for number, turn in enumerate(turns):
        if number:
            found = {}  # the turn before leaves memory
            _, found = gather(turn, whole=False)
        for layer in (layer for layer in turn if layer in found):
            own[layer], stack = found[layer].own, stack_of[layer]
            together[stack] = together[stack].together(found[layer]) if stack in together else found[layer]
    fill = partial(_filled, sees, modules, stack_of, together)
    if len(turns) == 1:
        return stream, statistics | fill(turns[0], found)
    held = _Turn(lambda number: fill(turns[number], gather(turns[number], whole=False)[1]))
    for number, turn in enumerate(turns):
        for layer in (layer for layer in turn if stack_of[layer] in together):
            statistics[layer] = Later(sees, own[layer], partial(held.of, number, layer))
    return stream, statistics


def in_turn(inputs: dict[str, int], sees: frozenset[str], room: float) -> list[list[str]]:
    """Layers, of which each has an input of its own, in groups whose statistics have `room` (bytes) at once.

    `inputs`: how many numbers enter each. One that has no room by itself is a group of its own.
    """
    turns: list[list[str]] = []
    taken = inf
    for layer, in_features in inputs.items():
        size = bytes_of(sees, in_features)
        if taken + size > room or not turns:
            turns.append([])
            taken = 0.0
        turns[-1].append(layer)
        taken += size
    return turns


def bytes_of(sees: frozenset[str], in_features: int) -> int:
    """What the statistics of one input take."""
    seen = Seen(sees)
    seen.add(torch.empty(1, in_features, device="meta"))
    return seen.nbytes


class _Turn:
    """The statistics of the experts whose turn it is."""

    def __init__(self, gather: Callable[[int], dict[str, Seen]]) -> None:
        self._gather, self._number, self._found = gather, -1, dict[str, Seen]()

    def of(self, number: int, layer: str) -> Seen:
        """Those of a layer of a turn, which others may have to make room for."""
        if self._number != number:
            self._found = {}  # before there are new ones
            self._number, self._found = number, self._gather(number)
        return self._found[layer]


def _gathered(
    sees: frozenset[str],
    walk: Walk,
    index: int,
    entering: Sequence[Tensor],
    experts: Container[str],
    originals: list[dict[str, Tensor]] | None,
    give: Callable[[Tensor], None] | None,
    layers: list[str],
    *,
    whole: bool,
) -> tuple[list[Tensor], dict[str, Seen]]:
    """One pass through a block: what it makes of its inputs, if `whole`, and what of the layers' inputs was seen."""
    block, stream = walk.blocks[index], []
    shared: dict[tuple[str, ...], Seen] = {}
    for number, hidden_BTH in enumerate(entering):
        if whole:
            output_BTH, inputs = walk.observe(index, block, hidden_BTH, layers)
            stream.append(output_BTH)
            if give is not None:
                give(output_BTH)
        else:
            inputs = walk.entering(index, block, hidden_BTH, layers)
        groups: dict[int, list[str]] = {}
        for layer, x in inputs.items():
            groups.setdefault(id(x), []).append(layer)
        for names in groups.values():
            statistic = shared.setdefault(tuple(names), Seen(sees))
            followed = originals and names[0] not in experts
            statistic.add(inputs[names[0]], originals[number][names[0]] if originals and followed else None)
    return stream, {name: statistic for names, statistic in shared.items() for name in names}


def _filled(
    sees: frozenset[str],
    modules: dict[str, Any],
    stack_of: dict[str, str],
    together: dict[str, Seen],
    layers: list[str],
    found: dict[str, Seen],
) -> dict[str, Seen]:
    """The statistics of experts, with those that saw less than `LEAST` tokens mixed with the mean of their stack."""
    statistics = {}
    for layer in layers:
        if (all_of_them := together.get(stack_of[layer])) is not None:
            own = found.pop(layer, Seen(sees))  # it leaves memory as soon as it is mixed
            statistics[layer] = own.filled(all_of_them, LEAST, modules[layer].in_features, modules[layer].weight.device)
    return statistics
