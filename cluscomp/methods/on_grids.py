"""Width and groups of a uniform grid for a limit of stored bits; torch is not needed to check settings."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field, model_validator

from cluscomp.methods.each_layer import EachLayer
from cluscomp.settings import settings

if TYPE_CHECKING:
    from cluscomp.forms.uniform import Zeros

MAX_WIDTH = 8


class Grid(NamedTuple):
    """Bits of a number, groups of inputs that each output has, how their zeros are stored, the stored bits."""

    width: int
    groups: int
    zeros: "Zeros"
    bits: int

    @property
    def symmetric(self) -> bool:
        """Whether there are no zeros."""
        return self.zeros == "none"


def check_choice(bits: float | None, **shape: int | None) -> None:
    """Raise ValueError unless either `bits` or the `shape` is given, of which a group may be null."""
    names = [f"method.{name}" for name in shape]
    if bits is None and any(value is None for name, value in shape.items() if name != "group"):
        raise ValueError(f"give bits=3 (or another limit), or {' and '.join(names)}")
    if bits is not None and any(value is not None for value in shape.values()):
        raise ValueError(
            f"bits={bits} chooses {' and '.join(names)} for each matrix, so they cannot be given too "
            f"(here {' and '.join(map(str, shape.values()))})"
        )


def grid_of(
    out_features: int,
    in_features: int,
    *,
    bits: float | None,
    width: int | None,
    group: int | None,
    zeros: "Zeros",
    scaled_inputs: bool = False,
) -> Grid:
    """The grid for a weight (O, I): the one given by hand, or the best whose stored bits stay at or under `bits`.

    See `widest`. A group costs 16 bits and those of its zero (`width`, 16 or none): so what is stored lies at most that
    sum over I under the limit, in bits per weight, and whole limits are met one bit lower: at bits=3 by numbers of 2
    bits in groups of 18, 16 without zeros. Numbers of 1 bit have no room for whole zeros. Raises ValueError if nothing
    fits.
    """
    from cluscomp.forms.uniform import UniformWeight

    def sized(width: int, groups: int) -> Grid:
        kind: Zeros = "none" if width == 1 and zeros == "whole" else zeros
        parts = UniformWeight.bits(
            out_features=out_features,
            in_features=in_features,
            width=width,
            groups=groups,
            zeros=kind,
            scaled_inputs=scaled_inputs,
        )
        return Grid(width, groups, kind, sum(parts.values()))

    return widest(out_features, in_features, sized, bits=bits, width=width, group=group)


def widest(
    out_features: int,
    in_features: int,
    sized: Callable[[int, int], Grid],
    *,
    bits: float | None,
    width: int | None,
    group: int | None,
    least: int = 1,
) -> Grid:
    """What numbers of some width in some groups take, `sized`, where they are the best at or under `bits`.

    By hand at most `group` inputs of an output go together (null: all). With `bits` the width is the largest that
    leaves room for one group an output (more values beat smaller groups), then there are as many groups as fit; no
    width is below `least`. Raises ValueError if nothing fits.
    """
    if bits is None:
        assert width is not None  # check_choice
        return sized(width, 1 if group is None else -(-in_features // group))
    limit = bits * out_features * in_features
    for tried in range(MAX_WIDTH, least - 1, -1):
        groups = bisect_right(range(1, in_features + 1), limit, key=lambda groups: sized(tried, groups).bits)
        if groups:
            return sized(tried, groups)
    found = sized(least, 1).bits / (out_features * in_features)
    raise ValueError(
        f"bits={bits} is out of reach for a {out_features} x {in_features} matrix: "
        f"the least is {found:.3f}, with method.width={least} and one group a row"
    )


@settings
class Groups(EachLayer):
    """Settings of methods that store numbers of a few bits, and something for each group of an output's inputs.

    Either `bits` is given, the most bits per weight that may be stored, and width and groups are chosen for each matrix
    (see `widest`); or `width`, and `group`, the most inputs that go together (null: all of an output).
    """

    bits: float | None = Field(ge=1, le=8)
    width: int | None = Field(ge=1, le=8)
    group: int | None = Field(ge=1)

    @model_validator(mode="after")
    def _either_bits_or_width(self) -> "Groups":
        check_choice(self.bits, width=self.width, group=self.group)
        return self

    @abstractmethod
    def grid(self, out_features: int, in_features: int) -> Grid:
        """The grid for a weight (O, I). Raises ValueError if none meets the limit."""


@settings
class Grids(Groups):
    """Settings that methods on uniform grids share, and what follows from them: all but the work itself.

    A method says how its zeros are stored (`zeros`), and whether each input has a scale (`scaled_inputs`);
    `grid_of` says which limits can be met.
    """

    scaled_inputs: ClassVar[bool] = False

    @property
    @abstractmethod
    def zeros(self) -> "Zeros":
        """How the zeros of groups are stored."""

    def grid(self, out_features: int, in_features: int) -> Grid:
        """The grid for a weight (O, I). Raises ValueError as `grid_of`."""
        return grid_of(
            out_features,
            in_features,
            bits=self.bits,
            width=self.width,
            group=self.group,
            zeros=self.zeros,
            scaled_inputs=self.scaled_inputs,
        )


@settings
class WholeGrids(Grids):
    """Grids with whole numbers as zeros; if `symmetric` none is stored, and the grid is the same on both sides of 0."""

    symmetric: bool

    @property
    def zeros(self) -> "Zeros":
        """None or whole numbers."""
        return "none" if self.symmetric else "whole"
