"""What is stored: modules that rebuild a dense weight and count their own bits, and the one layer that uses them."""

import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cluscomp.kernels.codebook import multiply, multiply_by_tables, rebuild
from cluscomp.kernels.codes import code_bits, pack, packed_bytes, unpack
from cluscomp.kernels.loading import runs_triton

Axis = Literal["out", "in"]
FEW_TOKENS = 8  # up to so many a product is made straight from the codes
TILE = 2**21  # entries of a large weight that are rebuilt at a time
Storage = Literal["float16", "float8", "int8"]  # of codebooks; the paper's are 16-bit floats (section 3.2)
STORAGE = {"float16": torch.float16, "float8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"float8": 448.0, "int8": 127.0}  # kinds of 8 bits have a scale for each codebook
SCALE_BITS = 32


class Weight(Protocol):
    """A stored form of a weight, a module. The constructor takes what is stored, so loading is `Class(**stored)`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What can be trained."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        ...

    def __call__(self, dtype: torch.dtype, inputs: slice | None = None) -> Float[Tensor, "O I"]:
        """The dense weight (out features, in features) in `dtype`, differentiable in the module's parameters.

        `inputs`: only the columns of one of `tiles()`.
        """
        ...

    def tiles(self) -> list[slice]:
        """Ranges of inputs, together all, to be rebuilt one after the other; a single one where that is as well."""
        ...

    def product(self, x_BI: Float[Tensor, "B I"]) -> Float[Tensor, "B O"] | None:
        """x W^T for a few tokens without the dense weight, (B, I) -> (B, O), or None where there is no faster way."""
        ...

    def loosen(self) -> None:
        """Make float32 masters of the parameters, to be trained."""
        ...

    def settle(self) -> None:
        """Round trained masters to what is stored. Raises ValueError if they are not finite or do not fit."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict()` gave before `loosen`."""
        ...

    def ledger(self) -> dict[str, int]:
        """Stored bits by part (codes, codebooks, padding, ...), without what another weight stores."""
        ...

    def paper_bits(self) -> int:
        """Bits as the paper's Equation 3 counts them: 16 for each code, no padding; without codes those stored."""
        ...

    def spec(self) -> dict[str, Any]:
        """Plain values from which `empty(**spec)` makes a module of the same shapes."""
        ...


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


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """The narrowest of bfloat16, float16 and the tensor's own dtype that holds its values exactly.

    It is how tensors that are not compressed (embeddings, norms, biases) are stored, counted and compared.
    """
    if tensor.is_floating_point() and tensor.itemsize > 2:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return dtype
    return tensor.dtype


def codebook_bits(codebook_size: int, vector_dim: int, storage: Storage) -> int:
    """Stored bits of one codebook (K, D), its scale included."""
    return codebook_size * vector_dim * STORAGE[storage].itemsize * 8 + (SCALE_BITS if storage in LARGEST else 0)


class CodebookWeight(nn.Module):
    """A weight as codes into codebooks; the sub-vectors of M codebooks are added (the paper: M = 1).

    Stored: `codes` (M, bytes) uint8, packed at ceil(log2 K) bits each (kernels/codes.py), `codebooks` (M, K, D) and,
    for codebooks of 8 bits, `scales` (M,) float32. ClusComp section 3.2 is M = 1 and axis "out", AQLM's form M >= 1 and
    axis "in". To be trained the codebooks are made float32 masters (`loosen`), and rounded to their storage afterwards
    (`settle`). Weights may share codebooks of 16 bits: those after the first `follow` it, and each has `scales` of its
    own, which stay.
    """

    codes: Tensor
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
        stored, of_storage = rounded(codebooks_MKD, storage)
        return cls(
            packed, stored, of_storage if scales_M is None else scales_M,
            out_features=out_features, in_features=in_features, axis=axis, storage=storage,
        )  # fmt: skip

    @classmethod
    def empty(
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
    ) -> "CodebookWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into.

        `scaled`: with scales of its own over codebooks of 16 bits.
        """
        size = packed_bytes(num_sub_vectors(out_features, in_features, vector_dim, axis), code_bits(codebook_size))
        return cls(
            torch.empty(codebooks, size, dtype=torch.uint8),
            torch.empty(codebooks, codebook_size, vector_dim, dtype=STORAGE[storage]),
            torch.empty(codebooks) if scaled or storage in LARGEST else None,
            out_features=out_features,
            in_features=in_features,
            axis=axis,
            storage=storage,
        )

    def follow(self, first: "CodebookWeight") -> None:
        """Share the codebooks of another weight: one parameter, which the other stores and counts.

        Raises ValueError if their shapes differ or they have 8 bits, whose scales would have to be shared too.
        """
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
        if self._scaled:  # in float32, or the whole weight would be off by the scale's rounding
            return (self.codebooks.float() * cast(Tensor, self.scales)[:, None, None]).to(dtype)
        values_MKD = self.codebooks.to(dtype)
        return values_MKD if self.scales is None else values_MKD * self.scales.to(dtype)[:, None, None]

    def loosen(self) -> None:
        """Make the codebooks float32 masters that can be trained; of shared ones each weight may do so."""
        if self._scaled:
            self.codebooks.data = self.codebooks.data.float()
        else:
            self.codebooks.data = self.centroids(torch.float32).detach().clone()
            self.scales = None if self.scales is None else torch.ones_like(self.scales)
        self.codebooks.requires_grad_(True)

    def settle(self) -> None:
        """Round the codebooks to their storage. Raises ValueError if one is not finite or does not fit."""
        self.codebooks.requires_grad_(False)
        self.codebooks.grad = None
        self.codebooks.data, of_storage = rounded(self.codebooks.data, self.storage)
        self.scales = self.scales if self._scaled else of_storage

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back the codebooks of a `state_dict` made before `loosen`."""
        self.codebooks.requires_grad_(False)
        self.codebooks.grad = None
        self.codebooks.data, self.scales = state["codebooks"], state.get("scales")

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
        rows = cast(Tensor, sum(rebuild(book_KD, codes, bits, lines, length) for book_KD, codes in books))
        if self.axis == "out":
            return rows.T
        return rows.view(lines, self.out_features, -1).transpose(0, 1).flatten(1)[:, : self.in_features]

    def product(self, x_BI: Float[Tensor, "B I"]) -> Float[Tensor, "B O"] | None:
        """x W^T of a few tokens without building W: (B, I) -> (B, O); None where rebuilding W is the faster way."""
        size = self.codebooks.shape[1]
        on_cpu = x_BI.device.type == "cpu" and x_BI.dtype == torch.float32
        on_gpu = runs_triton(x_BI) and x_BI.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (on_cpu or (on_gpu and self.axis == "out")) or len(x_BI) > FEW_TOKENS:
            return None
        books = zip(self.codebooks if self.scales is None else self.centroids(torch.float32), self.codes)
        if self.axis == "out":
            bits = code_bits(size)
            parts = (multiply(x_BI, codes, bits, book, self.out_features) for book, codes in books)
            return cast(Tensor, sum(parts)).to(x_BI.dtype)
        if code_bits(size) != 8 or len(x_BI) > 1:
            return None
        tables = (multiply_by_tables(x_BI[0], codes, book, self.out_features, exact=True) for book, codes in books)
        return cast(Tensor, sum(tables))[None]

    def ledger(self) -> dict[str, int]:
        """Stored bits: codes (those of padded rows too), codebooks, padding of the packed stream.

        Scales of codebooks of 8 bits count as part of them. Codebooks that another weight stores do not count.
        """
        num_codebooks, size, _ = self.codebooks.shape
        codes = num_codebooks * self.num_codes * code_bits(size)
        parts = {"codes": codes, "codebooks": self._codebook_bits(), "padding": self.codes.numel() * 8 - codes}
        return parts | ({"scales": num_codebooks * SCALE_BITS} if self._scaled else {})

    def _codebook_bits(self) -> int:
        num_codebooks, size, dim = self.codebooks.shape
        return 0 if self.follows else num_codebooks * codebook_bits(size, dim, self.storage)

    def paper_bits(self) -> int:
        """Bits by Equation 3 of the paper: 16 for each code, whatever the codebook's size, and the codebooks."""
        num_codebooks = len(self.codebooks)
        scales = num_codebooks * SCALE_BITS if self._scaled else 0
        return num_codebooks * 16 * self.num_codes + self._codebook_bits() + scales

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
        """Raise ValueError if a code points past its codebook (a damaged file)."""
        size = self.codebooks.shape[1]
        if size & (size - 1) and int(self.unpacked().max()) >= size:
            raise ValueError(f"code {int(self.unpacked().max())} exceeds the codebook of {size} centroids")


def rounded(codebooks_MKD: Float[Tensor, "M K D"], storage: Storage) -> tuple[Tensor, Tensor | None]:
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
    """Codebooks (M, K, D) in float32 with the values they have once stored. Raises ValueError as `rounded`."""
    stored, scales_M = rounded(codebooks_MKD, storage)
    return stored.float() if scales_M is None else stored.float() * scales_M[:, None, None]


class _RebuiltLinear(torch.autograd.Function):
    """x W^T + b that keeps x and the stored form for the backward pass, never the dense W.

    Of a large W only a tile exists at a time, forward and backward, and of its gradient too.
    """

    @staticmethod
    def forward(ctx, x, bias, weight, *parameters):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.tiles = weight, weight.tiles()
        if x.dtype != torch.float32 or x.device.type != "cpu":  # sums of tiles are to be float32
            ctx.tiles = [slice(0, x.shape[-1])]
        ctx.save_for_backward(x, *parameters)
        if len(ctx.tiles) == 1:
            return F.linear(x, weight(x.dtype), bias)
        y = x.new_zeros(*x.shape[:-1], weight.out_features) if bias is None else bias.repeat(*x.shape[:-1], 1)
        y_BO = y.view(-1, weight.out_features)
        for inputs in ctx.tiles:
            y_BO.addmm_(x[..., inputs].reshape(-1, inputs.stop - inputs.start), weight(x.dtype, inputs).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x = ctx.saved_tensors[0]  # unpacking also checks that no parameter changed since the forward pass
        parameters = list(ctx.weight.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        sums: list[Tensor] = []
        for inputs in ctx.tiles:
            with torch.enable_grad():
                dense_OI = ctx.weight(x.dtype, inputs)
            if grad_x is not None:
                grad_x[..., inputs] = grad @ dense_OI.detach()
            if trained:
                grad_BO, x_BI = grad.reshape(-1, grad.shape[-1]), x[..., inputs].reshape(-1, dense_OI.shape[1])
                # tiles: in the memory order of the codes, so that nothing is transposed on the way to the codebooks
                dense_grad_OI = grad_BO.T @ x_BI if len(ctx.tiles) == 1 else (x_BI.T @ grad_BO).T
                found = torch.autograd.grad(dense_OI, trained, dense_grad_OI)
                sums = [a.add_(b) for a, b in zip(sums, found)] if sums else list(found)
        grads = iter(sums)
        return grad_x, grad_bias, None, *(next(grads) if p.requires_grad else None for p in parameters)


class CompressedLinear(nn.Module):
    """A linear layer whose weight is stored compressed; one class for all methods and model families.

    The dense weight lives only during a forward or backward pass. `weight` is an empty tensor of zero bytes: it gives
    code that asks for `layer.weight.dtype` its answer, and it makes a loader that does not know this layer stop at a
    shape mismatch instead of filling in random weights.
    """

    weight: Tensor

    def __init__(self, stored: nn.Module, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features: int = stored.in_features  # type: ignore[assignment]
        self.out_features: int = stored.out_features  # type: ignore[assignment]
        self.stored = stored
        device = next(stored.parameters()).device
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """x W^T + b with the weight rebuilt in x's dtype: (..., I) -> (..., O)."""
        if not torch.is_grad_enabled():
            product_BO = self.stored.product(x.reshape(-1, self.in_features))  # type: ignore[operator]
            if product_BO is not None:
                return (product_BO if self.bias is None else product_BO + self.bias).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
        return _RebuiltLinear.apply(x, self.bias, self.stored, *self.stored.parameters())  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
