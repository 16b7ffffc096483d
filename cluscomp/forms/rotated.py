"""Weights stored in rotated coordinates: random signs and a Hadamard transform, which spread outliers evenly.

As QuIP# (arXiv 2402.04396, section 3) and QuaRot (arXiv 2404.00456) do; all of it is made from one seed.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cluscomp.forms.stored import Combined, Stored, build, described

SEED_BITS = 64
LARGEST_FACTOR = 64  # of a transform that is made in one product


class Rotated(Combined):
    """A weight W as `inner`, which stores Q_O W Q_I^T: outputs, inputs or both in rotated coordinates (see `turned`).

    Stored beside `inner`: `seed` (1,) int64, from which all signs are made. The rotation is undone where the weight is
    used, to 1e-5 of its size, in float32.
    """

    kind = "rotated"
    seed: Tensor

    def __init__(self, inner: Stored, seed: Int64[Tensor, "1"], *, inputs: bool, outputs: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = inner.out_features, inner.in_features
        self.inner, self.inputs, self.outputs = inner, inputs, outputs
        self.register_buffer("seed", seed)

    @classmethod
    def empty(cls, *, inner: dict[str, Any], inputs: bool, outputs: bool) -> "Rotated":
        """A form over one of this spec with undefined content, on the default device; to be loaded into."""
        return cls(build(inner), torch.empty(1, dtype=torch.int64), inputs=inputs, outputs=outputs)

    @classmethod
    def own_bits(cls, *, inner: dict[str, Any], inputs: bool, outputs: bool) -> dict[str, int]:  # noqa: ARG003
        """Those of the seed, whatever the shapes."""
        return {"seeds": SEED_BITS}

    @property
    def parts(self) -> tuple[Stored]:
        """What is stored in rotated coordinates."""
        return (self.inner,)

    def spec(self) -> dict[str, Any]:
        """Kind and shapes of what is stored, and the sides that are rotated."""
        return {"inner": described(self.inner), "inputs": self.inputs, "outputs": self.outputs}

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:  # noqa: ARG002
        """The dense weight (O, I) in `dtype`, turned back in float32; `inputs` is all of them (see `tiles`)."""
        dense_OI = self.inner(torch.float32)
        if self.inputs:
            dense_OI = turned_back(dense_OI, signs_of_inputs(self.seed, self.in_features))
        if self.outputs:
            dense_OI = turned_back(dense_OI.T, signs_of_outputs(self.seed, self.out_features)).T
        return dense_OI.to(dtype)  # type: ignore[no-any-return]

    def product(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"] | None:
        """x W^T by turning x and what `inner` makes of it, (..., I) -> (..., O); None where `inner` gives none."""
        x_BI = x.reshape(-1, self.in_features).float()
        product_BO = self.inner.product(
            turned(x_BI, signs_of_inputs(self.seed, self.in_features)) if self.inputs else x_BI
        )
        if product_BO is not None and self.outputs:
            product_BO = turned_back(product_BO, signs_of_outputs(self.seed, self.out_features))
        return None if product_BO is None else product_BO.to(x.dtype).view(*x.shape[:-1], self.out_features)


def rotated(
    weight_OI: Float[Tensor, "O I"], seed: Int64[Tensor, "1"], *, inputs: bool, outputs: bool
) -> Float[Tensor, "O I"]:
    """What a `Rotated` of this seed and these sides has to store of a float32 weight: (O, I) -> (O, I)."""
    if inputs:
        weight_OI = turned(weight_OI, signs_of_inputs(seed, weight_OI.shape[1]))
    if outputs:
        weight_OI = turned(weight_OI.T, signs_of_outputs(seed, weight_OI.shape[0])).T
    return weight_OI


def turned(x_BN: Float[Tensor, "B N"], signs_N: Float[Tensor, " N"]) -> Float[Tensor, "B N"]:
    """Each row x (of B) as Q x: signs of its N numbers, then the transform of `spread_out`; Q is orthogonal."""
    return spread_out(x_BN * signs_N)


def turned_back(x_BN: Float[Tensor, "B N"], signs_N: Float[Tensor, " N"]) -> Float[Tensor, "B N"]:
    """The inverse of `turned`: (B, N) -> (B, N)."""
    return spread_out(x_BN) * signs_N


def spread_out(x_BN: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Each row of (B, N) times a symmetric orthogonal matrix, its own inverse, that spreads every number over all N.

    That of N = 2^k is Hadamard's. An odd factor of N has Hartley's of that order in its place: 576 = 64 x 9 and
    1536 = 64 x 8 x 3 are products of Kronecker.
    """
    shape, after = x_BN.shape, 1
    for factor in factors(shape[1]):
        matrix_FF = orthogonal(factor, x_BN.device).to(x_BN.dtype)
        parts = x_BN.reshape(-1, factor, after)
        x_BN = (parts[:, :, 0] @ matrix_FF if after == 1 else matrix_FF @ parts).reshape(shape)
        after *= factor
    return x_BN


def factors(size: int) -> list[int]:
    """A size as a product of powers of two, at most 64, and its odd part; none of them is 1."""
    odd, found = size // (size & -size), []
    left = size // odd
    while left > 1:
        found.append(min(left, LARGEST_FACTOR))
        left //= found[-1]
    return found + ([odd] if odd > 1 else [])


def orthogonal(order: int, device: torch.device) -> Float[Tensor, "F F"]:
    """A symmetric orthogonal matrix (F, F): Hadamard's for a power of two, Hartley's for odd orders, in float32."""
    if order % 2:
        numbers_F = torch.arange(order, device=device)
        angles_FF = (numbers_F[:, None] * numbers_F % order).double() * (2 * math.pi / order)
        return ((angles_FF.cos() + angles_FF.sin()) / math.sqrt(order)).float()
    matrix_FF = torch.ones(1, 1, device=device)
    while len(matrix_FF) < order:
        upper = torch.cat([matrix_FF, matrix_FF], 1)
        matrix_FF = torch.cat([upper, torch.cat([matrix_FF, -matrix_FF], 1)])
    return matrix_FF / math.sqrt(order)


def signs_of_inputs(seed: Int64[Tensor, "1"], size: int) -> Float[Tensor, " N"]:
    """The signs (N,) of a layer's inputs, 1 or -1."""
    return signs(seed, size, 0)


def signs_of_outputs(seed: Int64[Tensor, "1"], size: int) -> Float[Tensor, " N"]:
    """The signs (N,) of a layer's outputs, 1 or -1."""
    return signs(seed, size, 2**32)


def signs(seed: Int64[Tensor, "1"], size: int, first: int) -> Float[Tensor, " N"]:
    """Random signs (N,) on the seed's device, 1 or -1, the same on all: the top bits of SplitMix64 from number `first`.

    As in its authors' code, where the state begins with the seed (https://prng.di.unimi.it/splitmix64.c).
    """
    z_N = seed + (torch.arange(size, device=seed.device) + (first + 1)) * signed(0x9E3779B97F4A7C15)
    z_N = (z_N ^ (z_N >> 30 & 2**34 - 1)) * signed(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> 27 & 2**37 - 1)) * signed(0x94D049BB133111EB)
    z_N = z_N ^ (z_N >> 31 & 2**33 - 1)
    return torch.where(z_N < 0, -1.0, 1.0)


def signed(number: int) -> int:
    """A number of 64 bits as torch's int64, whose sums and products wrap, holds it."""
    return number - 2**64 if number >= 2**63 else number
