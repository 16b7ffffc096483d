"""A weight and its inputs' second moment in coordinates turned on both sides, for methods that store `Rotated`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cluscomp.forms.rotated import SEED_BITS, Rotated, rotated, signed, signs_of_inputs, turned
from cluscomp.forms.stored import Stored
from cluscomp.solve.along_outputs import damped
from cluscomp.solve.layer import Layer, Seen


@dataclass(frozen=True)
class Turned:
    """A weight (O, I) and the damped second moment (I, I) of its inputs, both in the coordinates of `seed`."""

    weight_OI: Float[Tensor, "O I"]
    moment_II: Float[Tensor, "I I"]
    seed: Int64[Tensor, "1"]

    def stored(self, inner: Stored) -> Rotated:
        """The stored form of the weight, of what was made of the turned one."""
        return Rotated(inner, self.seed, inputs=True, outputs=True)


def start(
    weight_OI: Float[Tensor, "O I"], moment_II: Float[Tensor, "I I"], damping: float, generator: torch.Generator
) -> Turned:
    """Turn a float32 weight (O, I) on both sides, and the second moment (I, I) with it, by a seed that is drawn.

    `damping` is added to the moment's diagonal, as a share of its mean.
    """
    seed = torch.randint(2**63 - 1, (1,), generator=generator).to(weight_OI.device)
    signs_I = signs_of_inputs(seed, len(moment_II))
    turned_II = turned(turned(damped(moment_II, damping), signs_I).T, signs_I)
    return Turned(rotated(weight_OI, seed, inputs=True, outputs=True), turned_II, seed)


class Layers(dict[str, Layer]):
    """Layers of a block, each turned by the run's seed when it is read; those of one input share what is shown."""

    def __init__(self, layers: dict[str, Layer], *, inputs: bool, outputs: bool) -> None:
        super().__init__(dict.fromkeys(layers))  # type: ignore[arg-type]  # (read they are turned ones)
        self.layers, self.inputs, self.outputs = layers, inputs, outputs
        self.shown: tuple[Seen | None, Seen | None] = (None, None)  # the last one, as it was and turned

    @property
    def seed_bits(self) -> float:
        """Bits per weight of the seed, of the layer with the fewest weights."""
        return SEED_BITS / min(layer.weight_OI.numel() for layer in self.layers.values())

    def stored(self, name: str, inner: Stored) -> Rotated:
        """The stored form of a layer, of what was made of the turned one."""
        return Rotated(inner, self._seed(self.layers[name]), inputs=self.inputs, outputs=self.outputs)

    def __getitem__(self, name: str) -> Layer:
        layer = self.layers[name]
        weight_OI = rotated(layer.weight_OI.float(), self._seed(layer), inputs=self.inputs, outputs=self.outputs)
        return replace(layer, weight_OI=weight_OI, seen=self._turned(layer) if self.inputs else layer.seen)

    def items(self) -> Iterator[tuple[str, Layer]]:  # type: ignore[override]
        """Names and layers, each turned (O, I) when its turn comes."""
        return ((name, self[name]) for name in self)

    def values(self) -> Iterator[Layer]:  # type: ignore[override]
        """The layers, each turned (O, I) when its turn comes."""
        return (self[name] for name in self)

    def _seed(self, layer: Layer) -> Int64[Tensor, "1"]:
        return torch.tensor([signed(layer.seed)], device=layer.weight_OI.device)

    def _turned(self, layer: Layer) -> Seen | None:
        if layer.seen is not None and self.shown[0] is not layer.seen:
            signs_I = signs_of_inputs(self._seed(layer), layer.weight_OI.shape[1])
            self.shown = layer.seen, layer.seen.through(lambda x_TI: turned(x_TI, signs_I))
        return None if layer.seen is None else self.shown[1]
