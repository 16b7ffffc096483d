"""What compressing will do: a method's own `compress`, run on weights without numbers."""

import logging
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import torch

from cluscomp.forms.stored import Stored
from cluscomp.kernels.counting import Count
from cluscomp.kernels.work import Work
from cluscomp.methods import Method
from cluscomp.plan.places import Place
from cluscomp.solve.layer import Layer, Seen

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dry:
    """The stored forms that a method will make of the layers of a block, by name, on the meta device; what it costs.

    `peak`: bytes that it holds at most beside the block, experts' statistics and what is finished; other statistics
    leave memory with the last layer that reads their input. `exact`: whether these
    are the forms that it will make; else the likeliest, as errors of the real weights have a say.
    """

    stored: dict[str, Stored]
    work: Work
    peak: float
    exact: bool

    def forms(self) -> dict[str, Stored]:
        """The stored forms once more, to be put into a block."""
        return deepcopy(self.stored)


def compress(method: Method, places: dict[str, Place], dtype: torch.dtype) -> Dry | None:
    """What `method` does to the layers of a block, in `dtype`; None if it cannot be run without numbers.

    Raises ValueError, beginning with the layer's name, as the method would with the real weights.
    """
    try:
        return _kept(method, tuple(places.items()), dtype)  # type: ignore[arg-type]
    except TypeError:  # a list among the method's settings
        return _run(method, tuple(places.items()), dtype)


def _run(method: Method, places: tuple[tuple[str, Place], ...], dtype: torch.dtype) -> Dry | None:
    layers = {}
    for name, place in places:
        weight_OI = torch.empty(place.out_features, place.in_features, dtype=dtype, device="meta")
        layers[name] = Layer(weight_OI, place.input, None, torch.Generator().manual_seed(0), stack=place.stack)
    layers = _looked_at(layers, method.sees(), experts=True)
    stored: dict[str, Stored] = {}
    with Count() as count, torch.no_grad():
        layers = _looked_at(layers, method.sees(), experts=False)
        try:
            for compressed in method.compress(layers):
                stored |= compressed.stored
                for name, form in compressed.stored.items():
                    del layers[name]
                    count.leave_out(iter(form.state_dict().values()))
        except ValueError:
            raise
        except Exception as error:  # whatever code that was not written for it makes of tensors without numbers
            log.info(
                "no plan: %s cannot be run without numbers (%s: %s)", type(method).__name__, type(error).__name__, error
            )
            return None
    return Dry(stored, count.work, count.peak, count.exact)


def _looked_at(layers: dict[str, Layer], names: frozenset[str], *, experts: bool) -> dict[str, Layer]:
    """The layers, of which the experts, or the others, have statistics of their inputs, if any are asked for."""
    inputs = {
        layer.input: layer.weight_OI.shape[1] for layer in layers.values() if experts == (layer.stack is not None)
    }
    seen = {number: Seen(names) for number in inputs if names}
    for number, one in seen.items():
        one.add(torch.empty(1, inputs[number], device="meta"))
    return {name: replace(layer, seen=seen.get(layer.input, layer.seen)) for name, layer in layers.items()}


_kept = cache(_run)  # blocks are alike, and a check asks what a plan has asked
