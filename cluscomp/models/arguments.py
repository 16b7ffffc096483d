"""What a block is called with besides the hidden states: masks, position embeddings, what is made of the tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    Its numbers are those from `first` on.
    """

    first: int
    shape: torch.Size

    def of(self, stream_BTW: Tensor) -> Tensor:
        """The argument itself, (B, T, *shape), of the hidden states and all that travels with them (B, T, W)."""
        numbers_BTN = stream_BTW[..., self.first : self.first + self.shape.numel()]
        return numbers_BTN.reshape(*stream_BTW.shape[:2], *self.shape)


def carry(
    hidden_BTH: Tensor, arguments: list[Arguments], places: frozenset[int | str]
) -> tuple[Tensor, list[Arguments]]:
    """The hidden states with the arguments at some places behind them, and all arguments with `Carried` for these.

    (B, T, H) and the arguments of each block -> (B, T, W). A tensor that several blocks get is carried once. Raises
    ValueError, with the place, for one that cannot be: it is no tensor (B, T, ...) of the same type.
    """
    found: dict[int, Carried] = {}
    parts, width = [hidden_BTH], hidden_BTH.shape[2]
    changed = []
    for one in arguments:
        values: dict[int | str, Any] = {}
        for place, tensor in one.places().items():
            if place in places and tensor is not None:
                alike = isinstance(tensor, Tensor) and tensor.dtype == hidden_BTH.dtype
                if not alike or tensor.shape[:2] != hidden_BTH.shape[:2]:
                    raise ValueError(f"argument {place}")
                if id(tensor) not in found:
                    found[id(tensor)] = Carried(width, tensor.shape[2:])
                    parts.append(tensor.reshape(*hidden_BTH.shape[:2], -1))
                    width += parts[-1].shape[2]
                values[place] = found[id(tensor)]
        changed.append(one.changed(values))
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


def same(first: Any, second: Any) -> bool:
    """Whether two blocks' arguments are equal, tensors by value, or by shape where they have none."""
    if isinstance(first, Tensor):
        if first is second or not isinstance(second, Tensor):
            return first is second
        return first.shape == second.shape if first.is_meta else torch.equal(first, second)
    if isinstance(first, Arguments):
        return isinstance(second, Arguments) and same(first.args, second.args) and same(first.kwargs, second.kwargs)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(same(one, two) for one, two in zip(first, second))
    return bool(first == second)
