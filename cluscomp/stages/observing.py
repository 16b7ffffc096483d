"""What stage cluster sees of the layers' inputs, and how weights follow what compressed blocks do to them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor, nn

from cluscomp.forms.apart import stacks
from cluscomp.models.original import linears
from cluscomp.models.walk import Walk
from cluscomp.solve.layer import Seen

LEAST = 256  # tokens of the calibration text, that an expert's statistics stand on


@dataclass(frozen=True)
class Following:
    """How the weights of a block follow the drift of their inputs; see `Cluster`."""

    strength: float
    damping: float
    again: Callable[..., tuple[list[Tensor], dict[str, Seen]]]  # `observe`, of the layers that come next


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
    entering: list[Tensor],
    *,
    layers: list[str],
    originals: list[dict[str, Tensor]] | None = None,
) -> tuple[list[Tensor], dict[str, Seen]]:
    """What a block makes of its inputs (batches of (B, T, H)), and the named layers' statistics.

    Layers with one input share their statistics. `originals`: what enters the layers in the original, by batch; of
    experts it may be other tokens, and is not looked at. An expert that saw less than `LEAST` tokens has its statistics
    mixed with the mean of its stack's; one that saw none has those that are assumed without data.
    """
    block, stream = walk.blocks[index], []
    experts = {layer for stack in stacks(block).values() for layer in stack}
    shared: dict[tuple[str, ...], Seen] = {}
    for number, hidden_BTH in enumerate(entering):
        output_BTH, inputs = walk.observe(index, block, hidden_BTH, layers)
        stream.append(output_BTH)
        groups: dict[int, list[str]] = {}
        for layer, x in inputs.items():
            groups.setdefault(id(x), []).append(layer)
        for names in groups.values():
            statistic = shared.setdefault(tuple(names), Seen(sees))
            followed = originals and names[0] not in experts
            statistic.add(inputs[names[0]], originals[number][names[0]] if originals and followed else None)
    statistics = {name: statistic for names, statistic in shared.items() for name in names}
    return stream, _filled(sees, block, statistics) if statistics else statistics


def _filled(sees: frozenset[str], block: nn.Module, statistics: dict[str, Seen]) -> dict[str, Seen]:
    """The statistics, with those of experts that saw less than `LEAST` tokens mixed with the mean of their stack."""
    found = dict(statistics)
    for stack in stacks(block).values():
        seen = [statistics[layer] for layer in stack if layer in statistics]
        if seen:
            all_of_them = reduce(Seen.together, seen)
            for layer in stack:
                module: Any = block.get_submodule(layer)
                own = statistics.get(layer, Seen(sees))
                found[layer] = own.filled(all_of_them, LEAST, module.in_features, module.weight.device)
    return found
