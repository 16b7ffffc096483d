"""What an error of each layer costs the model's predictions: one pass backward through the original."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluscomp.forms.apart import stacks
from cluscomp.models.original import block_names, linears
from cluscomp.models.walk import Walk
from cluscomp.process import Progress
from cluscomp.store.records import read_sealed, write_sealed

FILE = "prices.json"  # in the stage's folder: what a killed run need not find again


def prices(walk: Walk, windows: list[Tensor], folder: Path) -> dict[str, float]:
    """By the name of each linear layer and block, what an error as large as its outputs costs: the rise of the loss.

    About: with the outputs z of a token and the gradient g of the loss to them, an error that is |z|^2 large and has no
    direction of its own raises the loss by |g|^2 |z|^2 / 2 O, to second order and if gradients are as those of labels
    drawn from the model (Fisher). The price is the mean of |g|^2 |z|^2 / O over tokens; the loss is the next token's
    cross-entropy on the text. The first token of a window is left out: its activations can be thousands of times those
    of others, and no other token is predicted like it.

    One block is in memory at a time, and what enters each: of 16,384 tokens of 4,096 numbers 134 MB a block in 16 bits.
    `windows` are batches of token ids (B, T).
    """
    known = read_sealed(folder / FILE)
    if known is not None:
        return dict(known["prices"])
    names, progress = block_names(walk.model), Progress("cluster, prices", 2 * len(walk))
    stream = [walk.embed(ids_BT) for ids_BT in windows]
    entering = []
    for index in range(len(walk)):
        entering.append(stream)
        with torch.no_grad(), walk.block(index) as block:
            stream = [walk.apply(index, block, hidden_BTH) for hidden_BTH in stream]
        progress.step("forward")
    length, tokens = windows[0].shape[1], sum(ids_BT.numel() for ids_BT in windows)
    gradients = [_of_the_loss(walk, hidden_BTH, ids_BT) for hidden_BTH, ids_BT in zip(stream, windows)]
    found: dict[str, float] = {}
    for index in reversed(range(len(walk))):
        with walk.block(index) as block:
            layers = linears(block)
            sums = dict.fromkeys(layers, 0.0)
            experts = {layer for stack in stacks(block).values() for layer in stack}
            handles = [
                one.register_forward_hook(_noting(sums, name, None if name in experts else length))
                for name, one in layers.items()
            ]
            sums[""] = 0.0  # of the block itself
            for number, (hidden_BTH, gradient_BTH) in enumerate(zip(entering.pop(), gradients)):
                with torch.enable_grad():
                    output_BTH = walk.apply(index, block, hidden_BTH.requires_grad_())
                    (gradients[number],) = torch.autograd.grad(output_BTH, hidden_BTH, gradient_BTH)
                own_BTH = output_BTH.detach()[..., : walk.width].float()  # not what travels behind
                sums[""] += _price(own_BTH.square().sum(-1), gradient_BTH[..., : walk.width], length)
            for handle in handles:
                handle.remove()
        found[names[index]] = sums.pop("") / tokens
        found |= {f"{names[index]}.{name}": total / tokens for name, total in sums.items()}
        progress.step("backward")
    write_sealed(folder / FILE, {"prices": found})
    return found


def _of_the_loss(walk: Walk, hidden_BTH: Tensor, ids_BT: Tensor) -> Tensor:
    """The gradient of the next token's cross-entropy, summed, to what the last block gives: (B, T, H)."""
    found = []
    for one_1TH, ids_1T in zip(hidden_BTH.split(1), ids_BT.split(1)):  # logits of one window at a time
        with torch.enable_grad():
            last_1TH = one_1TH.detach().requires_grad_()
            logits_TV = walk.logits(last_1TH, ids_1T)[0, :-1].float()
            loss = F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum")
            found += torch.autograd.grad(loss, last_1TH)
    return torch.cat(found)


def _noting(sums: dict[str, float], name: str, length: int | None) -> Callable[..., None]:
    """A hook that adds |g|^2 |z|^2 / O of all tokens but the first to the layer's sum, once its gradient is known.

    `length`: tokens of a window; some models have those of all windows in a row where a layer is. None: tokens of any
    windows in any order, as experts see them, of which all count.
    """

    def forward(_layer: Any, _args: Any, output: Tensor) -> None:
        if not output.requires_grad:  # the loss does not depend on it: an indexer's choice has no gradient
            return
        sizes = output.detach().float().square().sum(-1)

        def backward(gradient: Tensor) -> None:
            sums[name] += _price(sizes, gradient, length)

        output.register_hook(backward)

    return forward


def _price(sizes: Tensor, gradient: Tensor, length: int | None) -> float:
    """The sum over tokens of |z|^2 (...), which are `sizes`, times the mean of g^2, with g the gradient (..., O)."""
    both = gradient.float().square().mean(-1) * sizes
    return float(both.sum() if length is None else both.view(-1, length)[:, 1:].sum())
