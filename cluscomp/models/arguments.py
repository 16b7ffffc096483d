"""What a block is called with: hidden states, masks, position embeddings, what is made of the tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIGITS = 4  # of base 256, which every type of hidden states holds exactly: whole numbers of a token travel in these


@dataclass(frozen=True)
class Layout:
    """How hidden states lie where blocks get and give several `streams` of them: (B, T, S, H), or first (S, B, T, H).

    0 streams: (B, T, H). Everywhere but in a block they are one row of numbers for a token, (B, T, S H).
    """

    streams: int = 0
    first: bool = False

    @classmethod
    def of(cls, hidden: Tensor, windows: torch.Size) -> "Layout | None":
        """That of the hidden states of windows (B, T); None for any other.

        Without streams there may be more positions than tokens: prompts that a model puts before them, say.
        """
        if hidden.ndim == 3 and hidden.shape[0] == windows[0]:
            return cls()
        if hidden.ndim == 4 and windows in (hidden.shape[:2], hidden.shape[1:3]):
            first = hidden.shape[:2] != windows
            return cls(hidden.shape[0 if first else 2], first)
        return None

    def flat(self, hidden: Tensor) -> Tensor:
        """As a block gives them -> (B, T, S H)."""
        if not self.streams:
            return hidden
        return (hidden.movedim(0, 2) if self.first else hidden).flatten(2)

    def own(self, hidden_BTH: Tensor) -> Tensor:
        """(B, T, S H) -> as a block gets them."""
        if not self.streams:
            return hidden_BTH
        hidden_BTSH: Tensor = hidden_BTH.unflatten(2, (self.streams, -1))
        return hidden_BTSH.movedim(2, 0) if self.first else hidden_BTSH


@dataclass(frozen=True)
class Arguments:
    """Positional and named arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def places(self) -> dict[int | str, Any]:
        """The arguments by position or name."""
        found: dict[int | str, Any] = dict(enumerate(self.args))
        found.update(self.kwargs.items())
        return found

    def changed(self, values: dict[int | str, Any]) -> "Arguments":
        """With other values at some places."""
        return Arguments(
            tuple(values.get(index, one) for index, one in enumerate(self.args)),
            {name: values.get(name, one) for name, one in self.kwargs.items()},
        )


@dataclass(frozen=True)
class Carried:
    """Stands for an argument (B, T, *shape) that is made of the tokens, and travels behind the hidden states.

    Its numbers are those from `first` on, those of whole numbers (not negative) their digits.
    """

    first: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, stream_BTW: Tensor) -> Tensor:
        """The argument itself, (B, T, *shape), of the hidden states and all that travels with them (B, T, W)."""
        behind_BTN, before = stream_BTW[..., self.first :], stream_BTW.shape[:2]
        if self.dtype.is_floating_point:
            return behind_BTN[..., : self.shape.numel()].reshape(*before, *self.shape)
        digits = behind_BTN[..., : self.shape.numel() * DIGITS].reshape(*before, *self.shape, DIGITS).long()
        return sum(digits[..., place] << 8 * place for place in range(DIGITS)).to(self.dtype)  # type: ignore[union-attr]

    @staticmethod
    def numbers(argument: Tensor, dtype: torch.dtype) -> Tensor:
        """What travels, (B, T, N) of a type, for an argument (B, T, *shape)."""
        if not argument.is_floating_point():
            argument = torch.stack([argument.long() >> 8 * place & 255 for place in range(DIGITS)], -1).to(dtype)
        return argument.flatten(2) if argument.ndim > 2 else argument[..., None]


@dataclass(frozen=True)
class Handed:
    """What a block gives beside the hidden states, the `output`-th, and the next gets at a `place`: (B, T, *shape)."""

    place: int | str
    output: int
    shape: torch.Size

    @classmethod
    def among(cls, arguments: Arguments, given: Any, hidden_BTH: Tensor) -> "dict[int | str, Handed]":
        """Those of the arguments of a block that are what the block before gave, like its hidden states (B, T, H)."""
        return {
            place: cls(place, output, one.shape[2:])
            for output, one in enumerate(given if isinstance(given, tuple | list) else ())
            for place, argument in arguments.places().items()
            if argument is one
            and isinstance(one, Tensor)
            and (one.dtype, one.shape[:2]) == (hidden_BTH.dtype, hidden_BTH.shape[:2])
        }


@dataclass(frozen=True)
class Manner:
    """How a model's blocks are called: they give a tuple of so many things (0: none), the first the hidden states.

    Arguments at the places `carried` (a position or a name) are made of the tokens; they travel behind the first
    `width` numbers, a hidden state, and last what is `handed` to the next block.
    """

    gives: int
    layout: Layout
    carried: frozenset[int | str] = frozenset()
    handed: tuple[Handed, ...] = ()
    width: int | None = None


def behind(before_BTN: Tensor, given: Any, handed: tuple[Handed, ...]) -> list[Tensor]:
    """What travels behind the hidden states after a block, (B, T, N), of what did before it and what it gave."""
    kept = before_BTN.shape[2] - sum(one.shape.numel() for one in handed)
    return [before_BTN[..., :kept], *(Carried.numbers(given[one.output], before_BTN.dtype) for one in handed)]


def carry(hidden_BTH: Tensor, arguments: list[Arguments], manner: Manner) -> tuple[Tensor, list[Arguments]]:
    """The hidden states with all that travels behind them, and all arguments with `Carried` for these.

    (B, T, H) and the arguments of each block -> (B, T, W). A tensor that several blocks get is carried once; zeros
    stand for what is handed from block to block. Raises ValueError, with the place, for one that cannot be carried: it
    is no tensor (B, T, ...) of the same type or whole numbers.
    """
    found: dict[int, Carried] = {}
    parts, width = [hidden_BTH], hidden_BTH.shape[2]
    changed = []
    for one in arguments:
        values: dict[int | str, Any] = {}
        for place, tensor in one.places().items():
            if place in manner.carried and tensor is not None:
                if not isinstance(tensor, Tensor) or tensor.shape[:2] != hidden_BTH.shape[:2]:
                    raise ValueError(f"argument {place}")
                if tensor.is_floating_point() and tensor.dtype != hidden_BTH.dtype:
                    raise ValueError(f"argument {place}")
                if id(tensor) not in found:
                    found[id(tensor)] = Carried(width, tensor.shape[2:], tensor.dtype)
                    parts.append(Carried.numbers(tensor, hidden_BTH.dtype))
                    width += parts[-1].shape[2]
                values[place] = found[id(tensor)]
        changed.append(one.changed(values))
    for handed in manner.handed:
        here = {handed.place: Carried(width, handed.shape, hidden_BTH.dtype)}
        changed[1:] = [one.changed(here) for one in changed[1:]]
        parts.append(hidden_BTH.new_zeros(*hidden_BTH.shape[:2], handed.shape.numel()))
        width += handed.shape.numel()
    return torch.cat(parts, -1) if len(parts) > 1 else hidden_BTH, changed


def differing(first: Arguments, second: Arguments) -> set[int | str]:
    """The places at which two calls of one block differ."""
    one, other = first.places(), second.places()
    return {place for place in one.keys() | other.keys() if not same(one.get(place), other.get(place))}


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """What a block is called with: the hidden states, and all else."""
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states")
    return hidden, Arguments(tuple(args[1:]), kwargs)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block gives."""
    return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]


def same(first: Any, second: Any) -> bool:
    """Whether two blocks' arguments are equal, tensors by value, or by shape where they have none."""
    if isinstance(first, Tensor):
        if first is second or not isinstance(second, Tensor):
            return first is second
        return first.shape == second.shape if first.is_meta else torch.equal(first, second)
    if isinstance(first, Arguments):
        return isinstance(second, Arguments) and same(first.args, second.args) and same(first.kwargs, second.kwargs)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(same(one, two) for one, two in zip(first, second))
    return bool(first == second)
