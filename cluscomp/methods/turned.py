"""Any method on rotated weights: `cluster.rotation` turns a layer, the method compresses it, a `Rotated` form is kept.

As QuaRot (arXiv 2404.00456) and QuIP# (arXiv 2402.04396, section 3) do before they round: random signs and a Hadamard
transform of the inputs, the outputs or both spread outliers evenly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cluscomp import solve
from cluscomp.methods import Compressed, Method

if TYPE_CHECKING:  # torch is not needed to check settings
    from cluscomp.solve.layer import Layer

Side = Literal["inputs", "outputs", "both"]


@dataclass(frozen=True)
class Turned:
    """What `method` makes of weights whose inputs, outputs or both are turned. The seed's 64 bits are within its limit.

    All layers are turned by the run's seed. A method that looks at inputs is shown the second moment of turned ones.
    """

    method: Method
    side: Side
    bits: float | None

    @classmethod
    def around(cls, method: Method, side: Side) -> "Turned":
        """The method on turned weights, in its own limit of bits."""
        return cls(method, side, getattr(method, "bits", None))

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
        turned = solve.turned.Layers(layers, inputs=self.side != "outputs", outputs=self.side != "inputs")
        for found in self._within(turned.seed_bits, [*layers]).compress(turned):
            yield Compressed({name: turned.stored(name, inner) for name, inner in found.stored.items()}, found.chosen)

    def _within(self, seed_bits: float, names: list[str]) -> Method:
        """The method at what the seed leaves it of the limit. Raises ValueError if that is less than it can."""
        if self.bits is None:
            return self.method
        left = self.bits - seed_bits
        try:
            return replace(self.method, bits=left)  # type: ignore[type-var]
        except ValueError as error:
            raise ValueError(
                f"{names[0]}: bits={self.bits} is out of reach with cluster.rotation={self.side}: its seed leaves "
                f"{left:.3f}, less than this method takes"
            ) from error
