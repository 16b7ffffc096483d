"""Weights as codes into codebooks of sub-vectors: what ClusComp, GPTVQ and AQLM store."""

import math
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cluscomp.forms.stored import Extent, Few, Single, Stored, without_padding
from cluscomp.kernels.codebook import Product, multiply, multiply_by_tables, rebuild
from cluscomp.kernels.codes import code_bits, pack, packed_bytes, unpack
from cluscomp.kernels.loading import native, runs_triton

Axis = Literal["out", "in"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 8  # up to so many a product is made straight from the codes
TILE = 2**21  # entries of a large weight that are rebuilt at a time
Storage = Literal["float16", "float8", "int8"]  # of codebooks; the paper's are 16-bit floats (section 3.2)
STORAGE = {"float16": torch.float16, "float8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"float8": 448.0, "int8": 127.0}  # kinds of 8 bits have a scale for each codebook
SCALE_BITS = 32


def num_sub_vectors(out_features: int, in_features: int, vector_dim: int, axis: Axis) -> int:
    """N, the sub-vectors of a weight (O, I): lines times ceil(length / D). Raises ValueError if D exceeds a line."""
    lines, length = lines_of(out_features, in_features, axis)
    if not 1 <= vector_dim <= length:
        raise ValueError(f"vector_dim {vector_dim} is outside 1 to {length}, the length of a line along axis '{axis}'")
    return lines * math.ceil(length / vector_dim)


def lines_of(out_features: int, in_features: int, axis: Axis) -> tuple[int, int]:
    """Number and length of the lines of a weight (O, I) that are cut: (I, O) along "out", (O, I) along "in"."""
    return (in_features, out_features) if axis == "out" else (out_features, in_features)


def sub_vectors(weight_OI: Float[Tensor, "O I"], vector_dim: int, axis: Axis) -> Float[Tensor, "N D"]:
    """Cut a weight into sub-vectors: (O, I) -> (N, D), each row (column) padded with zeros to a multiple of D.

    With axis "out" (paper, section 3.2) a sub-vector is D neighbouring outputs of one input and N = I * ceil(O/D);
    with "in" it is D neighbouring inputs of one output and N = ceil(I/D) * O, outputs varying fastest. Raises
    ValueError if D exceeds the row.
    """
    out_features, in_features = weight_OI.shape
    num_vectors = num_sub_vectors(out_features, in_features, vector_dim, axis)
    rows = weight_OI.T if axis == "out" else weight_OI
    cut = F.pad(rows, (0, -rows.shape[1] % vector_dim)).reshape(len(rows), -1, vector_dim)
    return (cut if axis == "out" else cut.transpose(0, 1)).reshape(num_vectors, vector_dim)


def codebook_bits(codebook_size: int, vector_dim: int, storage: Storage) -> int:
    """Stored bits of one codebook (K, D), its scale included."""
    return codebook_size * vector_dim * STORAGE[storage].itemsize * 8 + (SCALE_BITS if storage in LARGEST else 0)


class CodebookWeight(Single):
    """A weight as codes into codebooks; the sub-vectors of M codebooks are added (the paper: M = 1).

    Stored: `codes` (M, bytes) uint8, packed at ceil(log2 K) bits each (kernels/codes.py), `codebooks` (M, K, D) and,
    for codebooks of 8 bits, `scales` (M,) float32. ClusComp section 3.2 is M = 1 and axis "out", AQLM's form M >= 1 and
    axis "in". The codebooks can be trained. Weights may share codebooks of 16 bits: those after the first `follow` it,
    and each has `scales` of its own, which stay.
    """

    kind = "codebook"
    trained = "codebooks"
    learns = frozenset({"values", "means"})
    codes: Tensor
    codebooks: nn.Parameter
    scales: Tensor | None
    follows: bool  # whether another weight stores and counts the codebooks

    def __init__(
        self,
        codes: UInt8[Tensor, "M bytes"],
        codebooks: Tensor,
        scales: Float[Tensor, " M"] | None = None,
        *,
        out_features: int,
        in_features: int,
        axis: Axis,
        storage: Storage = "float16",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.axis, self.storage = out_features, in_features, axis, storage
        self.follows = False
        self.register_buffer("codes", codes)
        self.codebooks = nn.Parameter(codebooks, requires_grad=codebooks.is_floating_point())
        self.register_buffer("scales", scales)
        self._held: Product | None = None  # of the last call, while codes and codebooks lie where they did

    def __getstate__(self) -> dict[str, Any]:
        """Without what is held: a copy has memory of its own."""
        return self.__dict__ | {"_held": None}

    @classmethod
    def from_codes(
        cls,
        codes_MN: Tensor,
        codebooks_MKD: Float[Tensor, "M K D"],
        scales_M: Float[Tensor, " M"] | None = None,
        *,
        out_features: int,
        in_features: int,
        axis: Axis,
        storage: Storage = "float16",
    ) -> "CodebookWeight":
        """Build from unpacked codes (M, N); centroids are rounded to `storage`. Raises ValueError on overflow.

        `scales_M` (M,) float32 multiply codebooks of 16 bits, which then other weights can share.
        """
        bits = code_bits(codebooks_MKD.shape[1])
        packed = torch.stack([pack(codes_N, bits) for codes_N in codes_MN])
        stored, of_storage = in_storage(codebooks_MKD, storage)
        return cls(
            packed, stored, of_storage if scales_M is None else scales_M,
            out_features=out_features, in_features=in_features, axis=axis, storage=storage,
        )  # fmt: skip

    @classmethod
    def empty(
        cls,
        *,
        out_features: Extent,
        in_features: Extent,
        axis: Axis,
        vector_dim: Extent,
        codebook_size: Extent,
        codebooks: Few,
        storage: Storage = "float16",
        scaled: bool = False,
    ) -> "CodebookWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into.

        `scaled`: with scales of its own over codebooks of 16 bits.
        """
        size = packed_bytes(num_sub_vectors(out_features, in_features, vector_dim, axis), code_bits(codebook_size))
        return cls(
            torch.empty(codebooks, size, dtype=torch.uint8),
            torch.empty(codebooks, codebook_size, vector_dim, dtype=STORAGE[storage]),
            torch.empty(codebooks, dtype=torch.float32) if scaled or storage in LARGEST else None,
            out_features=out_features,
            in_features=in_features,
            axis=axis,
            storage=storage,
        )

    @classmethod
    def bits(
        cls,
        *,
        out_features: int,
        in_features: int,
        axis: Axis,
        vector_dim: int,
        codebook_size: int,
        codebooks: int,
        storage: Storage = "float16",
        scaled: bool = False,
        follows: bool = False,
    ) -> dict[str, int]:
        """Stored bits: codes (those of padded rows too), codebooks, padding of the packed stream, scales of its own.

        Scales of codebooks of 8 bits count as part of them. `follows`: codebooks that another weight stores.
        """
        vectors, width = num_sub_vectors(out_features, in_features, vector_dim, axis), code_bits(codebook_size)
        parts = {
            "codes": codebooks * vectors * width,
            "codebooks": 0 if follows else codebooks * codebook_bits(codebook_size, vector_dim, storage),
            "padding": codebooks * (packed_bytes(vectors, width) * 8 - vectors * width),
        }
        return parts | ({"scales": codebooks * SCALE_BITS} if scaled and storage not in LARGEST else {})

    def follow(self, first: Stored) -> None:
        """Share the codebooks of another weight: one parameter, which the other stores and counts.

        Raises ValueError if their shapes differ or they have 8 bits, whose scales would have to be shared too.
        """
        if not isinstance(first, CodebookWeight):
            super().follow(first)
            return
        if first.codebooks.shape != self.codebooks.shape or self.storage != first.storage or self.storage in LARGEST:
            mine, other = ((*weight.codebooks.shape, weight.storage) for weight in (self, first))
            raise ValueError(f"codebooks {mine} cannot be those of another weight, {other}")
        self.codebooks, self.follows = first.codebooks, True

    @property
    def _scaled(self) -> bool:
        """Whether the scales are the weight's own and not its codebooks'."""
        return self.scales is not None and self.storage not in LARGEST

    @property
    def num_codes(self) -> int:
        """N, the sub-vectors (and codes) of one codebook."""
        return num_sub_vectors(self.out_features, self.in_features, self.codebooks.shape[2], self.axis)

    def unpacked(self) -> Tensor:
        """The codes as int32 (M, N)."""
        bits = code_bits(self.codebooks.shape[1])
        return torch.stack([unpack(codes, bits, self.num_codes) for codes in self.codes])

    def centroids(self, dtype: torch.dtype) -> Float[Tensor, "M K D"]:
        """The codebooks' values (M, K, D) in `dtype`; differentiable."""
        if self.scales is None:
            return self.codebooks.to(dtype)
        # in float32, or the whole weight would be off by the scale's rounding
        return (self.codebooks.float() * self.scales[:, None, None]).to(dtype)

    def masters(self) -> dict[str, Tensor]:
        """The centroids in float32; scales of 8 bits are then 1."""
        if self._scaled or self.scales is None:
            return super().masters()
        return {
            "codebooks": self.centroids(torch.float32).detach().clone(),
            "scales": torch.ones_like(self.scales),
        }

    def rounded(self, values: Tensor) -> dict[str, Tensor]:
        """Codebooks (M, K, D) in their storage. Raises ValueError if one is not finite or does not fit."""
        stored, of_storage = in_storage(values, self.storage)
        return {"codebooks": stored} | ({} if of_storage is None else {"scales": of_storage})

    def tiles(self) -> list[slice]:
        """Large weights of axis "out" are rebuilt in tiles of some 2^21 entries that start on a whole byte of codes."""
        step = TILE // self.out_features // 8 * 8
        if self.axis == "in" or step == 0 or self.in_features <= 4 * step:
            return [slice(0, self.in_features)]
        return [slice(i, min(i + step, self.in_features)) for i in range(0, self.in_features, step)]

    def forward(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (O, I), or the columns of one of `tiles()`, in `dtype`.

        Codebooks are cast before the gather: training keeps float32 masters.
        """
        lines, length, packed = self.in_features, self.out_features, self.codes
        if self.axis == "in":  # the codes are (groups of inputs, outputs)
            vector_dim = self.codebooks.shape[2]
            lines, length = math.ceil(self.in_features / vector_dim), self.out_features * vector_dim
        bits = code_bits(self.codebooks.shape[1])
        if inputs is not None and self.axis == "out":
            lines, groups = inputs.stop - inputs.start, math.ceil(length / self.codebooks.shape[2])
            first = packed_bytes(inputs.start * groups, bits)
            packed = packed[:, first : first + packed_bytes(lines * groups, bits)]
        books = zip(self.centroids(dtype), packed)
        rows = reduce(add, (rebuild(book_KD, codes, bits, lines, length) for book_KD, codes in books))
        if self.axis == "out":
            return rows.T
        return rows.view(lines, self.out_features, -1).transpose(0, 1).flatten(1)[:, : self.in_features]

    def product(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"] | None:
        """x W^T of a few tokens without building W: (..., I) -> (..., O); None where rebuilding W is the faster way.

        On the CPU centroids and sums are exact or float32 whatever dtype x has, and y is rounded to it.
        """
        if x.dtype not in FLOATS or x.numel() > FEW_TOKENS * self.in_features:
            return None
        # their dictionaries: torch's look-up of an attribute takes longer than the product of a small layer
        codes, codebooks = self._buffers.get("codes"), self._parameters.get("codebooks")
        if self._held is not None and x.is_cpu and self._held.shares(codes, codebooks):
            return self._held(x, x.dtype)
        self._held = None
        product_BO = self._product_of_rows(x.reshape(-1, self.in_features))
        return None if product_BO is None else product_BO.view(*x.shape[:-1], self.out_features)

    def _product_of_rows(self, x_BI: Float[Tensor, "B I"]) -> Float[Tensor, "B O"] | None:
        if self.codebooks.is_meta or not (x_BI.is_cpu or (runs_triton(x_BI) and self.axis == "out")):
            return None
        bits = code_bits(self.codebooks.shape[1])
        if self.axis == "in" and (bits != 8 or len(x_BI) != 1):
            return None
        books, outputs = self.codebooks if self.scales is None else self.centroids(torch.float32), self.out_features
        if self.axis == "out" and len(books) == 1:
            if x_BI.is_cpu and native is not None and self.scales is None:
                self._held = Product(self.codes[0], bits, books[0], outputs)
            return multiply(x_BI, self.codes[0], bits, books[0], outputs, dtype=x_BI.dtype)
        if self.axis == "out":
            parts = [multiply(x_BI, codes, bits, book, outputs) for book, codes in zip(books, self.codes)]
        else:
            parts = [multiply_by_tables(x_BI[0], codes, book, outputs)[None] for book, codes in zip(books, self.codes)]
        return reduce(add, parts).to(x_BI.dtype)

    def forget(self) -> None:
        """Let go of codes and codebooks, which it holds for its next product."""
        self._held = None

    def ledger(self) -> dict[str, int]:
        """Stored bits; codebooks that another weight stores do not count."""
        return self.bits(**self.spec(), follows=self.follows)

    def paper_bits(self) -> int:
        """Bits by Equation 3 of the paper: 16 for each code, whatever the codebook's size, and the codebooks."""
        ledger = self.ledger()
        return without_padding(ledger) - ledger["codes"] + 16 * len(self.codebooks) * self.num_codes

    def coded(self) -> tuple[Tensor, int]:
        """The codes (M, N) and the codebooks' size K."""
        return self.unpacked(), self.codebooks.shape[1]

    def spec(self) -> dict[str, Any]:
        """What `empty` needs to make this module's shapes again."""
        num_codebooks, codebook_size, vector_dim = self.codebooks.shape
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "axis": self.axis,
            "vector_dim": vector_dim,
            "codebook_size": codebook_size,
            "codebooks": num_codebooks,
            "storage": self.storage,
        } | ({"scaled": True} if self._scaled else {})

    def check(self) -> None:
        """Raise ValueError if a code points past its codebook or a number is not finite (a damaged file)."""
        super().check()
        size = self.codebooks.shape[1]
        if size & (size - 1) and int(self.unpacked().max()) >= size:
            raise ValueError(f"code {int(self.unpacked().max())} exceeds the codebook of {size} centroids")


def in_storage(codebooks_MKD: Float[Tensor, "M K D"], storage: Storage) -> tuple[Tensor, Tensor | None]:
    """Codebooks (M, K, D) as they are stored, and the scales (M,) of those of 8 bits (the largest value is the type's).

    Raises ValueError for values that are not finite or do not fit a 16-bit float.
    """
    largest_M = codebooks_MKD.abs().amax((1, 2)).float()
    if not bool((largest_M <= torch.finfo(torch.float16).max).all()):
        raise ValueError(f"a centroid of size {float(largest_M.max()):.3g} does not fit a 16-bit float")
    if storage not in LARGEST:
        return codebooks_MKD.to(STORAGE[storage]), None
    scales_M = torch.where(largest_M > 0, largest_M / LARGEST[storage], 1.0)
    scaled_MKD = codebooks_MKD.float() / scales_M[:, None, None]
    return (scaled_MKD.round() if storage == "int8" else scaled_MKD).to(STORAGE[storage]), scales_M


def centroid_values(codebooks_MKD: Float[Tensor, "M K D"], storage: Storage) -> Float[Tensor, "M K D"]:
    """Codebooks (M, K, D) in float32 with the values they have once stored. Raises ValueError as `in_storage`."""
    stored, scales_M = in_storage(codebooks_MKD, storage)
    return stored.float() if scales_M is None else stored.float() * scales_M[:, None, None]
