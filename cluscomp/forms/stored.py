"""What all stored forms of a weight share, and forms that are made of forms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Annotated, Any, ClassVar, cast

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, ValidationError, validate_call
from torch import Tensor, nn

KINDS: dict[str, type["Stored"]] = {}  # forms by their name in config.json; forms/layers.py, which knows all, fills it
# what specs may say; each `empty` is strict about the types of its arguments
Extent = Annotated[int, Field(ge=1, lt=2**31)]
Few = Annotated[int, Field(ge=1, le=256)]
Width = Annotated[int, Field(ge=1, le=8)]
MOST = 65_504.0  # of a 16-bit float


class Stored(nn.Module, ABC):
    """A stored form of a weight (out features, in features). The constructor takes what is stored.

    A form of a single trained tensor is a `Single`, one that is made of other forms a `Combined`.
    """

    kind: ClassVar[str]  # name in config.json
    learns: ClassVar[frozenset[str]] = frozenset({"values"})  # what of it can learn: settings of stage block_finetune
    post_norm: bool = False  # whether its layer normalises what it gives: to mean 0 and variance 1, without weights
    out_features: int
    in_features: int

    @classmethod
    @abstractmethod
    def empty(cls, *args: Any, **spec: Any) -> "Stored":
        """A form of the given shapes with undefined content, on the default device; to be loaded into."""

    @classmethod
    @abstractmethod
    def bits(cls, *args: Any, **spec: Any) -> dict[str, int]:
        """Stored bits by part (codes, codebooks, padding, ...), from shapes alone."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain values from which `empty(**spec)` makes a form of the same shapes."""

    @abstractmethod
    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (O, I) in `dtype`, differentiable in the parameters.

        `inputs`: only the columns of one of `tiles()`.
        """

    @abstractmethod
    def to_masters(self) -> None:
        """Make float32 masters of the parameters, to be trained."""

    @abstractmethod
    def to_storage(self) -> None:
        """Round trained masters to what is stored. Raises ValueError if they are not finite or do not fit."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict()` gave before `to_masters`."""

    def tiles(self) -> list[slice]:
        """Ranges of inputs, together all, to be rebuilt one after the other; a single one where that is as well."""
        return [slice(0, self.in_features)]

    def product(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"] | None:  # noqa: ARG002
        """x W^T for a few tokens without the dense weight, (..., I) -> (..., O), or None where no way is faster."""
        return None

    def ledger(self) -> dict[str, int]:
        """Stored bits by part, without what another weight stores."""
        return self.bits(**self.spec())

    def decoded_bytes(self) -> int:
        """Bytes that stay in memory beside what is stored, once the weight was used."""
        return 0

    def forget(self) -> None:
        """Let go of what stays decoded."""

    def paper_bits(self) -> int:
        """Bits as the paper's Equation 3 counts them: 16 for each code, no padding; without codes those stored."""
        return without_padding(self.ledger())

    def follow(self, first: "Stored") -> None:
        """Share the trained tensors of another weight, which stores and counts them. Raises ValueError if it cannot."""
        raise ValueError(f"a {type(self).__name__} cannot share what it stores with a {type(first).__name__}")

    def coded(self) -> tuple[Tensor, int] | None:
        """Codes (M, N) into codebooks of vectors, and the codebooks' size K; None if there are none."""
        return None

    def lies_on(self, *, width: int, group: int) -> bool:  # noqa: ARG002
        """Whether it can hold, without loss, what lies on a grid of `width` bits in groups of `group` inputs."""
        return False

    def check(self) -> None:
        """Raise ValueError if a number is not finite (a damaged file)."""
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                raise ValueError(f"NaN or infinity among its {name}")


class Single(Stored):
    """A form with one trained tensor, the parameter named `trained`."""

    trained: ClassVar[str]

    def rounded(self, values: Tensor) -> dict[str, Tensor]:
        """Trained values as they are stored, in 16 bits, with other tensors that follow from them, by name.

        Raises ValueError if they are not finite or do not fit.
        """
        return {self.trained: in_16_bits(values)}

    def masters(self) -> dict[str, Tensor]:
        """The values to be trained in float32, with other tensors that change with them, by name."""
        return {self.trained: self.values.detach().to(torch.float32, copy=True)}

    @property
    def values(self) -> nn.Parameter:
        """What can be trained."""
        return self.get_parameter(self.trained)

    def to_masters(self) -> None:
        """Make float32 masters of the values; of shared ones each weight may do so."""
        self._put(self.masters())
        self.values.requires_grad_(True)

    def to_storage(self) -> None:
        """Round the values to their storage. Raises ValueError if one is not finite or does not fit."""
        values = self.masters()[self.trained]  # of 8-bit numbers that were cast, with their scales
        self._freeze()
        self._put(self.rounded(values))

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back the tensors of a `state_dict` made before `to_masters`."""
        self._freeze()
        self._put(state)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *more: Any) -> None:
        """Stored numbers that are loaded where masters are become masters again."""
        found = state.get(prefix + self.trained)
        again = found is not None and self.values.requires_grad and found.dtype != self.values.dtype
        if again:
            self._freeze()
            self.values.data = torch.empty_like(self.values, dtype=cast(Tensor, found).dtype)
        super()._load_from_state_dict(state, prefix, *more)
        if again:
            self.to_masters()

    def _freeze(self) -> None:
        self.values.requires_grad_(False)
        self.values.grad = None

    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name == self.trained:
                self.values.data = tensor
            else:
                setattr(self, name, tensor)


class Combined(Stored):
    """A form that is made of other forms, which store, count and train what is theirs.

    Weights of this form share all trained tensors or none.
    """

    @property
    @abstractmethod
    def parts(self) -> Sequence[Stored]:
        """The forms that it is made of, in the order of its spec."""

    @classmethod
    def own_bits(cls, *args: Any, **spec: Any) -> dict[str, int]:  # noqa: ARG003
        """Bits by part of what it stores beside its parts."""
        return {}

    @classmethod
    def bits(cls, *args: Any, **spec: Any) -> dict[str, int]:
        """Its own bits and those of its parts, from shapes alone."""
        return total(cls.own_bits(*args, **spec), *(KINDS[one["kind"]].bits(**shapes(one)) for one in nested(spec)))

    def ledger(self) -> dict[str, int]:
        """Its own bits and those of its parts, without what another weight stores."""
        return total(self.own_bits(**self.spec()), *(part.ledger() for part in self.parts))

    def decoded_bytes(self) -> int:
        """As the parts say."""
        return sum(part.decoded_bytes() for part in self.parts)

    def forget(self) -> None:
        """Let go of what the parts decoded."""
        for part in self.parts:
            part.forget()

    def paper_bits(self) -> int:
        """As the parts count themselves, and its own bits as stored."""
        return without_padding(self.own_bits(**self.spec())) + sum(part.paper_bits() for part in self.parts)

    def to_masters(self) -> None:
        """Make float32 masters of what its parts train."""
        for part in self.parts:
            part.to_masters()

    def to_storage(self) -> None:
        """Round what its parts trained. Raises ValueError if something is not finite or does not fit."""
        for part in self.parts:
            part.to_storage()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what its parts had in a `state_dict` made before `to_masters`."""
        names = {part: f"{name}." for name, part in self.named_modules()}
        for part in self.parts:
            inside = {key: tensor for key, tensor in state.items() if key.startswith(names[part])}
            part.restore({key.removeprefix(names[part]): tensor for key, tensor in inside.items()})

    def follow(self, first: Stored) -> None:
        """Let each part share what the same part of another weight trains. Raises ValueError if one cannot."""
        if not isinstance(first, Combined) or [*map(type, first.parts)] != [*map(type, self.parts)]:
            super().follow(first)
            return
        for part, other in zip(self.parts, first.parts):
            part.follow(other)

    def coded(self) -> tuple[Tensor, int] | None:
        """Codes and size of the codebooks of the first part that has some: (M, N), K."""
        return next((found for found in (part.coded() for part in self.parts) if found), None)

    def check(self) -> None:
        """Raise ValueError if one of its parts is damaged."""
        for part in self.parts:
            part.check()


def in_16_bits(values: Tensor) -> Tensor:
    """Scales of any shape as 16-bit floats. Raises ValueError if one is not finite or does not fit."""
    if not bool((values.abs() <= MOST).all()):
        raise ValueError(f"a scale of size {float(values.abs().max()):.3g} does not fit a 16-bit float")
    return values.to(torch.float16)


def described(form: Stored) -> dict[str, Any]:
    """Kind and shapes of a form, as config.json holds them."""
    return {"kind": form.kind} | form.spec()


def build(spec: dict[str, Any]) -> Stored:
    """A form with undefined content from its kind and shapes, on the default device.

    Raises ValueError for a kind that is not known, and for a value that its `empty` does not take.
    """
    form = KINDS.get(str(spec.get("kind")))
    if form is None:
        raise ValueError(f"a stored weight of kind '{spec.get('kind')}'; this version knows {', '.join(KINDS)}")
    try:
        return _strict(form)(**shapes(spec))
    except ValidationError as error:
        wrong = error.errors()[0]
        value = "" if wrong["type"] == "missing_keyword_only_argument" else f" = {str(wrong['input'])[:60]}"
        raise ValueError(f"{'.'.join(map(str, wrong['loc']))}{value}: {wrong['msg']}") from error


@cache
def _strict(form: type[Stored]) -> Callable[..., Stored]:
    return validate_call(config=ConfigDict(strict=True))(form.empty)


def as_stored(form: Stored) -> dict[str, Tensor]:
    """The tensors of a form as they are stored if some are masters now, or were cast; of any other form none.

    The form stays as it is. Raises ValueError if a trained number is not finite or does not fit.
    """
    with torch.device("meta"):
        kinds = {name: tensor.dtype for name, tensor in build(described(form)).state_dict().items()}
    if all(tensor.dtype == kinds[name] for name, tensor in form.state_dict().items()):
        return {}
    copy = deepcopy(form)
    copy.to_storage()
    return {name: tensor.to(kinds[name]) for name, tensor in copy.state_dict().items()}


def shapes(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec without its kind."""
    return {key: value for key, value in spec.items() if key != "kind"}


def nested(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs inside a spec."""
    values = [one for value in spec.values() for one in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, dict)]


def total(*ledgers: dict[str, int]) -> dict[str, int]:
    """The sum of ledgers, part by part."""
    return {part: sum(one.get(part, 0) for one in ledgers) for part in dict.fromkeys(p for one in ledgers for p in one)}


def without_padding(ledger: dict[str, int]) -> int:
    """All bits of a ledger but those that fill up bytes."""
    return sum(bits for part, bits in ledger.items() if part != "padding")
