"""A layer as methods see it: its weight, and what calibration text shows of its inputs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.solve.drift import Drift

PANELS, PANEL = 4, 192  # X^T X is made of at most so many parts, as wide as a multiple of this


class Sum:
    """A statistic of a layer's inputs: the sum of `of(x_TI)` over all tokens, in float32 on the inputs' device."""

    total: Tensor | None = None

    def of(self, x_TI: Float[Tensor, "T I"]) -> Tensor:
        """What is added for some tokens (T, I)."""
        raise NotImplementedError

    def unknown(self, size: int) -> Tensor:
        """What it is for a token whose inputs nobody has seen: all alike, none going with another."""
        return torch.ones(size)

    def add(self, x_TI: Float[Tensor, "T I"]) -> None:
        """Take in the inputs (T, I) of some more tokens."""
        new = self.of(x_TI)
        self.total = new if self.total is None else self.total.add_(new)


class SecondMoment(Sum):
    """X^T X, (I, I): 1.2 GB for the widest layer of a 70B model."""

    def of(self, x_TI: Float[Tensor, "T I"]) -> Tensor:
        """(T, I) -> (I, I), of which on the CPU the part below the diagonal is a copy of that above."""
        inputs = x_TI.shape[1]
        if x_TI.device.type != "cpu":
            return x_TI.T @ x_TI
        found_II = x_TI.new_empty(inputs, inputs)
        panel = -(-inputs // PANELS // PANEL) * PANEL
        for begin in range(0, inputs, panel):
            end = begin + panel
            found_II[begin:end, begin:] = x_TI[:, begin:end].T @ x_TI[:, begin:]
            found_II[end:, begin:end] = found_II[begin:end, end:].T
        return found_II

    def unknown(self, size: int) -> Tensor:
        """The identity, (I, I)."""
        return torch.eye(size)


class Squares(Sum):
    """The sum of squares of each input, (I,)."""

    def of(self, x_TI: Float[Tensor, "T I"]) -> Tensor:
        """(T, I) -> (I,)."""
        return x_TI.square().sum(0)


class Sizes(Sum):
    """The sum of sizes of each input, (I,)."""

    def of(self, x_TI: Float[Tensor, "T I"]) -> Tensor:
        """(T, I) -> (I,)."""
        return torch.linalg.vector_norm(x_TI, 1, dim=0)  # type: ignore[no-any-return]


def _rows(x: Float[Tensor, "*batch I"]) -> Float[Tensor, "T I"]:
    return x.detach().reshape(-1, x.shape[-1]).float()


STATISTICS: dict[str, type[Sum]] = {"moment": SecondMoment, "diagonal": Squares, "magnitude": Sizes}


class Seen:
    """The statistics of a layer's inputs that a method asks for by name, over the same tokens.

    "moment": the second moment H = X^T X / tokens; "diagonal": the mean square of each input, which "moment" tells too;
    "magnitude": the mean size of each input. Layers that read one input share one object. `drift`: what the inputs are
    off the original's, where these are given.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.tokens = 0
        self.own = 0  # tokens that were really seen; `filled` adds others
        self.drift: Drift | None = None
        self._parts = {name: STATISTICS[name]() for name in sorted(names)}

    def add(self, x: Float[Tensor, "*batch I"], original: Float[Tensor, "*batch I"] | None = None) -> None:
        """Take in the inputs of some more tokens: (..., I); and what they are in the original."""
        x_TI = _rows(x)
        for part in self._parts.values():
            part.add(x_TI)
        self.tokens += len(x_TI)
        self.own += len(x_TI)
        if original is not None:
            self.drift = self.drift or Drift()
            self.drift.add(x_TI, _rows(original))

    def filled(self, others: "Seen", least: int, size: int, device: torch.device) -> "Seen":
        """As if at least so many tokens had been seen: what lacks is the mean of what `others` saw.

        Where no token at all was seen it is what is assumed without data, for `size` inputs.
        """
        found = Seen(self._parts)
        found.own = self.own
        if self.tokens == 0:
            found.tokens = 1
            for part in found._parts.values():
                part.total = part.unknown(size).to(device)
        elif (lacking := least - self.tokens) > 0:
            found.tokens = least
            for name, part in found._parts.items():
                part.total = self._total(name) + others._total(name) * (lacking / others.tokens)
        else:
            return self
        return found

    def together(self, other: "Seen") -> "Seen":
        """What both saw."""
        found = Seen(self._parts)
        found.tokens = self.tokens + other.tokens
        for name, part in found._parts.items():
            part.total = self._total(name) + other._total(name)
        return found

    @property
    def matrix_II(self) -> Float[Tensor, "I I"]:
        """H, (I, I). Raises ValueError if "moment" was not asked for, no token was seen, or H is not finite."""
        return self._mean("moment")

    @property
    def diagonal_I(self) -> Float[Tensor, " I"]:
        """Mean square of each input, (I,). Raises ValueError as `matrix_II`, of "moment" or "diagonal"."""
        if "moment" in self._parts:
            return self._of(self._total("moment").diagonal())
        return self._mean("diagonal")

    @property
    def magnitude_I(self) -> Float[Tensor, " I"]:
        """Mean absolute value of each input, (I,). Raises ValueError as `matrix_II`, of "magnitude"."""
        return self._mean("magnitude")

    def through(self, turn: Callable[[Tensor], Tensor]) -> "Seen":
        """What the second moment, which must have been asked for, is of turned inputs: rows (T, I) -> (T, I)."""
        found = Seen({"moment"})
        found.tokens, found._parts["moment"].total = self.tokens, turn(turn(self._total("moment")).T)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        drift = 0 if self.drift is None else self.drift.nbytes
        return drift + sum(part.total.nbytes for part in self._parts.values() if part.total is not None)

    def _mean(self, name: str) -> Tensor:
        return self._of(self._total(name))

    def _total(self, name: str) -> Tensor:
        if name not in self._parts:
            raise ValueError(f"the method did not ask for '{name}' of the layer's inputs (sees)")
        total = self._parts[name].total
        if total is None:
            raise ValueError("no calibration token reached this layer")
        return total

    def _of(self, total: Tensor) -> Tensor:
        if not total.is_meta and not bool(total.isfinite().all()):
            raise ValueError("its inputs on the calibration text have NaN or infinity: the original model overflows")
        return total / self.tokens


class Later(Seen):
    """Statistics of so many tokens that are gathered when they are asked for: `look` gives them."""

    def __init__(self, names: Iterable[str], own: int, look: Callable[[], Seen]) -> None:
        super().__init__(names)
        self.own, self._look = own, look

    @property
    def matrix_II(self) -> Float[Tensor, "I I"]:
        """H, (I, I), looked at now. Raises as `Seen.matrix_II`."""
        return self._look().matrix_II

    @property
    def diagonal_I(self) -> Float[Tensor, " I"]:
        """Mean square of each input, (I,), looked at now. Raises as `Seen.diagonal_I`."""
        return self._look().diagonal_I

    @property
    def magnitude_I(self) -> Float[Tensor, " I"]:
        """Mean absolute value of each input, (I,), looked at now. Raises as `Seen.magnitude_I`."""
        return self._look().magnitude_I

    def through(self, turn: Callable[[Tensor], Tensor]) -> Seen:
        """The second moment of turned inputs, rows (T, I) -> (T, I), looked at now. See `Seen.through`."""
        return self._look().through(turn)


@dataclass(frozen=True)
class Layer:
    """A finite dense weight (O, I) of a block, in the dtype the model computes in.

    Layers of a block with the same `input` read the same tensor, those with the same `stack` are experts that stand
    side by side. `seen` is what the method asked to see of it, None if nothing. The result may depend on the
    `generator`'s seed, and on the run's `seed`, which all layers share.
    """

    weight_OI: Tensor
    input: int
    seen: Seen | None
    generator: torch.Generator
    seed: int = 0
    price: float | None = None  # of an error as large as its outputs, if that is known; see stages/prices.py
    stack: str | None = None

    @property
    def worth(self) -> float:
        """How much the relative error of its outputs counts where bits are shared out: its price, or its weights."""
        return float(self.weight_OI.numel()) if self.price is None else self.price

    def show(self) -> Seen:
        """What was asked for of the inputs; whoever asks for something gets it."""
        assert self.seen is not None
        return self.seen
