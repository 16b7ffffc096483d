"""Low rank: two thin matrices in the place of a weight, by its singular values (the untrained ranking of ACIP)."""

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
    from cluscomp.solve.low_rank import Directions

STEPS = 64  # ranks that a matrix is offered, evenly spaced


@settings
class LowRankFactors:
    """Take a weight for U V, the first R of its singular directions, with the root of a singular value on both sides.

    Either `bits` is given, the most bits per weight that may be stored, scales included, and the rank is the largest
    within; or `rank`, by hand. A share s of a dense model's numbers, as papers tell sizes, is bits = 16 s. Numbers have
    16 bits, or with a `width` below lie on symmetric grids of about `group` neighbours of a factor's row.

    `weighting` "none": of the weight itself, no data. "moment": of the layer's outputs (SVD-LLM), by the second moment
    of its inputs, to whose diagonal `damping` is added as a share of its mean. `allocation` "uniform" gives every
    matrix `bits`; "fill" shares those of a block out by what the outputs lose, with no less than a share `floor` for a
    matrix. With allocation=model that is one ranking of all singular values by what each takes and adds. Stages rank
    and cut (ACIP, arXiv 2502.01717) rank directions by masks that learn.
    """

    bits: float | None = Field(ge=0.05, le=16)
    rank: int | None = Field(ge=1)
    width: int = Field(ge=1, le=16)
    group: int = Field(ge=1)
    weighting: Literal["none", "moment"]
    allocation: Literal["uniform", "fill"]
    floor: float = Field(ge=0, le=1)
    damping: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _fit_together(self) -> "LowRankFactors":
        check_choice(self.bits, rank=self.rank)
        if 8 < self.width < 16:
            raise ValueError(f"method.width={self.width}: numbers have up to 8 bits, or 16")
        return self

    def sees(self) -> frozenset[str]:
        """The second moment of the inputs, where the outputs count."""
        return frozenset({"moment"} if self.weighting == "moment" else set())

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """Layer after layer; see `Method.compress`."""
        methods = [self] * len(layers)
        if self.allocation == "fill" and self.bits is not None and len(layers) > 1:
            options = solve.allocate.share_out([*self.offers(layers)], self.bits)
            methods = [replace(self, **option.settings) for option in options]
        for (name, found), method in zip(self._directions(layers), methods):
            with named([name]):
                rank = method._rank(layers[name])
                stored = found.stored(rank, self.width, self.group)
            yield Compressed({name: stored}, {"rank": rank})

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """By what is left out of the squared outputs, exactly; see `methods.Offers`."""
        assert self.bits is not None  # who asks for offers has looked
        for name, found in self._directions(layers):
            layer = layers[name]
            with named([name]):
                shape = layer.weight_OI.shape[0], layer.weight_OI.shape[1]
                most = min(shape)
                ranks = [self._rank(layer), *range(1, most + 1, -(-most // STEPS))]
                costs = {rank: solve.low_rank.bits(*shape, rank, self.width, self.group) for rank in ranks}
            least = self.floor * self.bits * layer.weight_OI.numel()
            options = [
                solve.allocate.Option(cost, layer.worth * found.lost(rank), {"bits": None, "rank": rank})
                for rank, cost in costs.items()
                if rank == ranks[0] or cost >= least
            ]
            yield solve.allocate.Menu([name], layer.weight_OI.numel(), options)

    def _rank(self, layer: "Layer") -> int:
        """R for a layer. Raises ValueError if none is within `bits`, or one by hand is more than there are."""
        outputs, inputs = layer.weight_OI.shape
        if self.bits is not None:
            return solve.low_rank.within(self.bits, outputs, inputs, self.width, self.group)
        assert self.rank is not None  # check_choice
        if self.rank > min(outputs, inputs):
            raise ValueError(f"method.rank={self.rank}: a weight of {outputs} x {inputs} has {min(outputs, inputs)}")
        return self.rank

    def _directions(self, layers: "dict[str, Layer]") -> "Iterator[tuple[str, Directions]]":
        """One layer after the other, with its directions."""
        if self.weighting == "moment":
            for name, moment_II in with_moments(layers, self.damping, lambda moment_II: moment_II):
                with named([name]):
                    found = solve.low_rank.directions(layers[name].weight_OI, moment_II)
                yield name, found
        else:
            for name in list(layers):
                with named([name]):
                    found = solve.low_rank.directions(layers[name].weight_OI, None)
                yield name, found
