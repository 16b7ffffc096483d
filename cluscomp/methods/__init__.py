"""HOW a weight is compressed: the Method protocol. One file a method; methods do not import each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # torch is not needed to check settings
    from cluscomp.forms.stored import Stored
    from cluscomp.solve.allocate import Menu
    from cluscomp.solve.layer import Layer


@dataclass(frozen=True)
class Compressed:
    """The stored forms of some layers of a block by name, and what was chosen for them, as plain values."""

    stored: "dict[str, Stored]"
    chosen: dict[str, Any]


@runtime_checkable
class Method(Protocol):
    """How the weights of one block are compressed: a frozen settings class that sees tensors only.

    The planner runs `compress` on weights without numbers (kernels/counting.py), so a method that is made of torch and
    of what solve/ and forms/ offer is planned without a word of its own.
    """

    def sees(self) -> frozenset[str]:
        """What must be known of the layers' inputs, by the names of `solve.layer.Seen`; empty: no text is read."""
        ...

    def compress(self, layers: "dict[str, Layer]") -> Iterator[Compressed]:
        """The stored form of every layer of a block (see `forms.stored.Stored`), some layers at a time.

        A layer is read when its turn comes, and not again after it was given back: the stage may put others in their
        place, or correct the weights of later ones. The result depends on the layers, the settings and the
        generators' seeds alone, and where matrices are decomposed on the number of torch's threads. Raises
        ValueError, beginning with the layer's name, for what cannot be.
        """
        ...


@runtime_checkable
class Offers(Method, Protocol):
    """A method whose bits can be shared out, inside a block or over the whole model."""

    @property
    def bits(self) -> float | None:
        """The most bits per weight that may be stored; None: its settings fix what is stored."""
        ...

    def offers(self, layers: "dict[str, Layer]") -> "Iterator[Menu]":
        """For each layer, or for layers that go together, what they may have at and around `bits`, some at a time.

        `dataclasses.replace(method, **option.settings)` is the method that makes an option's stored form of them.
        """
        ...
