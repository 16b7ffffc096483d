"""Low-rank binary: two matrices of signs with scales, for 1 bit a weight and below (DBF, NanoQuant)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cluscomp import solve
from cluscomp.errors import named
from cluscomp.methods import Compressed
from cluscomp.methods.each_layer import with_moments
from cluscomp.methods.on_grids import check_choice
from cluscomp.settings import settings

if TYPE_CHECKING:
    from cluscomp.solve.allocate import Menu
    from cluscomp.solve.layer import Layer
    from cluscomp.solve.signs import Factors, Inputs

LEAST_BITS = 0.05
STEPS = (0.8, 1.0, 1.25)  # of `bits`, at which a menu's errors are measured
SHORT = 6  # rounds of such a measurement, at most


@settings
class LowRankBinary:
    """Take a weight for diag(h) U diag(m) V diag(g): U and V of signs, 1 bit each, scales of 16 bits (solve/signs.py).

    Either `bits` is given, the most bits per weight that may be stored, scales and padding included; or `rank`, the
    columns of U, by hand. A rank takes O + I + 16 bits, the scales of outputs and inputs 16 (O + I).

    Signs are found in `rounds` of splitting (ADMM), then they and the scales descend `descents` times on what the
    layer's output loses; time is that of the rounds, nearly. `allocation` "uniform" gives every matrix `bits`; "fill"
    shares those of a block out by the relative errors of the outputs, with no less than a share `floor` of them for a
    matrix. `damping` is added to the diagonal of the second moment, as a share of its mean.

    Unlike DBF and NanoQuant: the second moment counts as a whole, there and in the scales, a factor is solved for
    against signs, and signs descend. Outputs do not count by gradients. Training is that of the stages: scales learn.
    """

    bits: float | None = Field(ge=LEAST_BITS, le=8)
    rank: int | None = Field(ge=1)
    allocation: Literal["uniform", "fill"]
    floor: float = Field(ge=0, le=1)
    rounds: int = Field(ge=0)
    descents: int = Field(ge=0)
    damping: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _fit_together(self) -> "LowRankBinary":
        check_choice(self.bits, rank=self.rank)
        return self

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs."""
        return frozenset({"moment"})

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Layer after layer; see `Method.compress`."""
        methods = [self] * len(layers)
        shared = self.allocation == "fill" and self.bits is not None and len(layers) > 1
        if shared:
            methods = [
                replace(self, **option.settings)
                for option in solve.allocate.share_out([*self.offers(layers)], self.bits)  # type: ignore[arg-type]
            ]
        for (name, inputs), method in zip(with_moments(layers, self.damping, solve.signs.Inputs), methods):
            with named([name]):
                stored = method._factored(layers[name], inputs, method.rounds, method.descents).stored()
            yield Compressed({name: stored}, {"bits": method.bits} if shared else {})

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """By errors measured in a few rounds; see `methods.Offers`."""
        assert self.bits is not None
        for name, inputs in with_moments(layers, self.damping, solve.signs.Inputs):
            weight_OI = layers[name].weight_OI.float()
            errors = []
            least = max(LEAST_BITS, solve.signs.least_bits(*weight_OI.shape))
            with named([name]):
                for step in STEPS:
                    bits = min(max(step * self.bits, least), 8.0)
                    found = replace(self, bits=bits)._factored(layers[name], inputs, min(self.rounds, SHORT), 0)
                    errors.append((bits, solve.signs.relative_error(weight_OI, inputs.moment_II, found)))
            yield solve.allocate.rates_menu(name, layers[name], errors, self.bits, self.floor, least)

    def _factored(self, layer: "Layer", inputs: "Inputs", rounds: int, descents: int) -> "Factors":
        outputs, columns = layer.weight_OI.shape
        rank = self.rank or solve.signs.rank_within(self.bits, outputs, columns)  # type: ignore[arg-type]
        return solve.signs.factored(
            layer.weight_OI.float(), inputs, rank, rounds=rounds, descents=descents, generator=layer.generator
        )
