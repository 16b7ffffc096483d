"""Any method on rotated weights: `cluster.rotation` turns a layer, the method compresses it, a `Rotated` form is kept.

As QuaRot (arXiv 2404.00456) and QuIP# (arXiv 2402.04396, section 3) do before they round: random signs and a Hadamard
transform of the inputs, the outputs or both spread outliers evenly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from cluscomp.errors import named
from cluscomp.methods import Compressed, Method

if TYPE_CHECKING:  # torch is not needed to check settings
    from cluscomp.forms.stored import Stored
    from cluscomp.solve.layer import Layer, Seen

Side = Literal["inputs", "outputs", "both"]


@dataclass(frozen=True)
class Turned:
    """What `method` makes of weights whose inputs, outputs or both are turned. The seed's 64 bits are within its limit.

    All layers are turned by the run's seed. A method that looks at inputs is shown the second moment of turned ones.
    """

    method: Method
    side: Side

    def sees(self) -> frozenset[str]:
        """What the method asks for; of turned inputs that follows from their second moment alone.

        Raises ValueError for a method that asks for more.
        """
        asked = self.method.sees()
        if self.side == "outputs" or not asked:
            return asked
        if "magnitude" in asked:
            raise ValueError(
                f"cluster.rotation={self.side}: this method asks for the mean size of inputs, which is not known of "
                "turned ones; cluster.rotation=outputs works"
            )
        return frozenset({"moment"})

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """The form of each turned layer, as a `Rotated` one; see `Method.compress`."""
        import torch

        from cluscomp.forms.rotated import SEED_BITS, Rotated

        inputs, outputs = self.side != "outputs", self.side != "inputs"
        numbers = min(layer.weight_OI.numel() for layer in layers.values())
        for found in _within(self.method, SEED_BITS / numbers, [*layers]).compress(_Turned(layers, inputs, outputs)):
            stored: dict[str, Stored] = {}
            for name, inner in found.stored.items():
                seed = torch.tensor([layers[name].seed], device=layers[name].weight_OI.device)
                stored[name] = Rotated(inner, seed, inputs=inputs, outputs=outputs)
            yield Compressed(stored, found.chosen)


def _within(method: Any, bits: float, names: list[str]) -> Any:
    """The method with this much less a weight. Raises ValueError if that is less than it can."""
    if getattr(method, "bits", None) is None:
        return method
    with named(names):
        return replace(method, bits=method.bits - bits)


class _Turned(dict[str, "Layer"]):
    """Layers that are turned when they are read: those of one input share what is shown of it."""

    def __init__(self, layers: "dict[str, Layer]", inputs: bool, outputs: bool) -> None:
        super().__init__(dict.fromkeys(layers))  # type: ignore[arg-type]
        self.layers, self.sides = layers, {"inputs": inputs, "outputs": outputs}
        self.shown: tuple[Seen | None, Seen | None] = (None, None)  # the last one, as it was and turned

    def __getitem__(self, name: str) -> "Layer":
        import torch

        from cluscomp.forms.rotated import rotated, signs_of_inputs, turned

        layer = self.layers[name]
        seed = torch.tensor([layer.seed], device=layer.weight_OI.device)
        seen = layer.seen
        if seen is not None and self.sides["inputs"]:
            if self.shown[0] is not seen:
                signs_I = signs_of_inputs(seed, layer.weight_OI.shape[1])
                self.shown = seen, seen.through(lambda x_TI: turned(x_TI, signs_I))
            seen = self.shown[1]
        return replace(layer, weight_OI=rotated(layer.weight_OI.float(), seed, **self.sides), seen=seen)

    def items(self) -> Iterator[tuple[str, "Layer"]]:  # type: ignore[override]
        return ((name, self[name]) for name in self)

    def values(self) -> Iterator["Layer"]:  # type: ignore[override]
        return (self[name] for name in self)
