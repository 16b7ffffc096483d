"""Weights as the sum of several forms: codes and what they leave out, say."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from cluscomp.forms.stored import Combined, Stored, build, described


class Sum(Combined):
    """A weight as the sum of `parts`, all of one shape."""

    kind = "sum"

    def __init__(self, parts: list[Stored]) -> None:
        """Raises ValueError if the shapes differ."""
        super().__init__()
        shapes = {(part.out_features, part.in_features) for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"a sum of weights of {' and '.join(f'{o} x {i}' for o, i in sorted(shapes))}")
        ((self.out_features, self.in_features),) = shapes
        for number, part in enumerate(parts):  # no ModuleList: a model's blocks are found by theirs
            self.add_module(str(number), part)

    @classmethod
    def empty(cls, *, parts: list[dict[str, Any]]) -> "Sum":
        """A form of parts of these specs with undefined content, on the default device; to be loaded into."""
        return cls([build(part) for part in parts])

    @property
    def parts(self) -> list[Stored]:
        """What is added up."""
        return cast(list[Stored], list(self.children()))

    def spec(self) -> dict[str, Any]:
        """Kinds and shapes of all parts."""
        return {"parts": [described(part) for part in self.parts]}

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, added up in float32; `inputs` is all of them (see `tiles`)."""
        first, *others = (part(torch.float32) for part in self.parts)
        return sum(others, start=first).to(dtype)  # type: ignore[no-any-return]

    def product(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"] | None:
        """x W^T as the sum of what the parts give, (..., I) -> (..., O); None where one of them gives none."""
        products = []
        for part in self.parts:
            product = part.product(x)
            if product is None:
                return None
            products.append(product)
        return torch.stack(products).sum(0)
