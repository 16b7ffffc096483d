"""What bits are worth to what a block gives: gates on its layers' levels, learned by distillation from the original."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cluscomp.process import told
from cluscomp.solve.allocate import Menu, Option
from cluscomp.solve.gates import Gates, learned, nested
from cluscomp.stages.allocation import ByGates


def gated(
    allocation: ByGates,
    menus: Sequence[Menu],
    made: Callable[[list[str], Option], dict[str, Tensor]],
    apply: Callable[[nn.Module, Tensor], Tensor],
    block: nn.Module,
    streams: tuple[Sequence[Tensor], Sequence[Tensor]],
    worth: float,
    width: int | None = None,
) -> list[Menu]:
    """The menus of a dense block with what its outputs lose in the place of the damages; its weights are spent.

    Args:
        allocation: how many levels, and in how many steps their gates close.
        menus: what the layers may have.
        made: the dense weights (O, I) by name that an option makes of some layers. Those of all levels are kept.
        apply: runs the block on a batch: (B, T, H) -> (B, T, H).
        block: its linear layers have their dense weights, and no numbers of use when this ends.
        streams: what enters the original's block and what leaves it, batches of (B, T, H). One batch a step, in turns.
        worth: what an error as large as the block's output counts.
        width: numbers of a hidden state, if others travel behind it, which count nothing. See `Walk.width`.

    The loss is the squared error of the output relative to its square, without each window's first token, whose
    activations can be thousands of times those of others.
    """
    levels = [nested(menu, allocation.levels) for menu in menus]
    weights = [[made(menu.names, option) for option in each] for menu, each in zip(menus, levels)]
    gates, layers = Gates(levels), {name: _layer(block, name) for menu in menus for name in menu.names}
    for step in told(range(allocation.steps), allocation.steps, "gates", "step"):
        offsets = [_half_open(layers, each, top) for each, top in zip(weights, gates.top)]
        entering_BTH, leaving_BTH = (stream[step % len(stream)] for stream in streams)
        with torch.enable_grad():
            learning = {name: layer.weight.requires_grad_() for name, layer in layers.items()}
            given_BTH, target_BTH = (one[:, 1:, :width].float() for one in (apply(block, entering_BTH), leaving_BTH))
            loss = worth * (given_BTH - target_BTH).square().sum() / target_BTH.square().sum()
            found = torch.autograd.grad(loss, [*learning.values()], allow_unused=True)  # experts that no token reached
        gradients = dict(zip(learning, found))
        gates.learn([sum(_along(gradients[name], offset) for name, offset in each.items()) for each in offsets])
        gates.close(-(-gates.left // (allocation.steps - step)))
    return [learned(menu, each, worths) for menu, each, worths in zip(menus, levels, gates.worth)]


def _layer(block: nn.Module, name: str) -> Any:
    return block.get_submodule(name)


def _half_open(layers: dict[str, Any], levels: list[dict[str, Tensor]], top: int) -> dict[str, Tensor]:
    """Give layers the weights half-way between their level and the one below; returns the offsets of that gate."""
    high, low = levels[top], levels[max(top - 1, 0)]
    for name, weight_OI in high.items():
        layers[name].weight.requires_grad_(False).data = (weight_OI + low[name]) / 2
    return {name: weight_OI - low[name] for name, weight_OI in high.items()}


def _along(gradient_OI: Tensor | None, offset_OI: Tensor) -> float:
    return 0.0 if gradient_OI is None else float((gradient_OI.float() * offset_OI.float()).sum())
