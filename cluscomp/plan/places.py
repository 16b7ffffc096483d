"""Which layers a block of an outline has, and which of them read the same tensor: asked of its own forward pass."""

from typing import Any, NamedTuple

import torch.fx.experimental._config
from torch import Tensor, nn

from cluscomp.forms.apart import stacks
from cluscomp.models.original import linears
from cluscomp.models.walk import Walk

LOOKED = 32  # tokens that blocks are run on to see what enters each layer


class Place(NamedTuple):
    """Shape of a layer (O, I) and where it stands in its block.

    Those with one `input` read the same tensor. Experts of one `stack` see a `share` of the tokens each.
    """

    out_features: int
    in_features: int
    input: int
    stack: str | None = None
    share: float = 1.0


def observed(walk: Walk, hidden_BTH: Tensor) -> list[dict[str, Place]]:
    """The dense linear layers of each block that its forward pass runs, by name; `hidden_BTH` is on the meta device."""
    found: dict[str, dict[str, Place]] = {}  # by what blocks are made of: those that are alike are walked once
    made = [_made_of(block) for block in walk.blocks]
    for index, block in enumerate(walk.blocks):
        if made[index] in found:
            continue
        layers = linears(block)
        with chosen_all():
            _, entering = walk.observe(index, block, hidden_BTH, list(layers))
        numbers: dict[int, int] = {}
        inputs = {name: numbers.setdefault(id(x), len(numbers)) for name, x in entering.items()}
        called = {name: layers[name] for name in layers if name in inputs}
        places = {name: Place(one.out_features, one.in_features, inputs[name]) for name, one in called.items()}
        for stack, experts in stacks(block).items():
            for name in places.keys() & set(experts):
                tokens = entering[name].numel() / places[name].in_features
                places[name] = places[name]._replace(stack=stack, share=tokens / LOOKED)
        found[made[index]] = places
    return [found[one] for one in made]


def chosen_all() -> Any:
    """What a model chooses by its numbers are all of them where there are no numbers."""
    return torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]


def _made_of(block: nn.Module) -> str:
    """The parts of a block with all their plain values (sizes, kinds of attention) but its number."""

    def plain(part: nn.Module) -> dict[str, Any]:
        values = vars(part).items()
        return {key: one for key, one in values if isinstance(one, int | float | str) and key != "layer_idx"}

    return repr([(name, type(part), plain(part)) for name, part in block.named_modules()])
