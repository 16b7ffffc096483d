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
STORAGE_DTYPE = torch.float16  # of codebooks; the paper stores 16-bit floats (section 3.2)


class Weight(Protocol):
    """A stored form of a weight. The constructor takes exactly what is stored, so loading is `Class(**stored)`."""

    def __call__(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The dense weight (out features, in features) in `dtype`, differentiable in the module's parameters."""
        ...

    def product(self, x_BI: Float[Tensor, "B I"]) -> Float[Tensor, "B O"] | None:
        """x W^T for a few tokens without the dense weight, (B, I) -> (B, O), or None where there is no faster way."""
        ...

    def ledger(self) -> dict[str, int]:
        """Stored bits by part (codes, codebooks, padding, ...)."""
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
    if tensor.is_floating_point():
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return dtype
    return tensor.dtype


class CodebookWeight(nn.Module):
    """A weight as codes into codebooks; the sub-vectors of M codebooks are added (the paper: M = 1).

    Stored: `codes` (M, bytes) uint8, packed at ceil(log2 K) bits each (kernels/codes.py), and `codebooks` (M, K, D).
    ClusComp section 3.2 is M = 1 and axis "out"; AQLM's form is M >= 1 and axis "in".
    """

    codes: Tensor

    def __init__(
        self,
        codes: UInt8[Tensor, "M bytes"],
        codebooks: Float[Tensor, "M K D"],
        *,
        out_features: int,
        in_features: int,
        axis: Axis,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.axis = out_features, in_features, axis
        self.register_buffer("codes", codes)
        self.codebooks = nn.Parameter(codebooks)

    @classmethod
    def from_codes(
        cls, codes_MN: Tensor, codebooks_MKD: Float[Tensor, "M K D"], *, out_features: int, in_features: int, axis: Axis
    ) -> "CodebookWeight":
        """Build from unpacked codes (M, N); centroids are rounded to 16-bit floats. Raises ValueError on overflow."""
        stored = codebooks_MKD.to(STORAGE_DTYPE)
        if not bool(stored.isfinite().all()):
            raise ValueError(f"a centroid of size {float(codebooks_MKD.abs().max()):.3g} does not fit a 16-bit float")
        bits = code_bits(codebooks_MKD.shape[1])
        packed = torch.stack([pack(codes_N, bits) for codes_N in codes_MN])
        return cls(packed, stored, out_features=out_features, in_features=in_features, axis=axis)

    @classmethod
    def empty(
        cls, *, out_features: int, in_features: int, axis: Axis, vector_dim: int, codebook_size: int, codebooks: int
    ) -> "CodebookWeight":
        """A module of the given shapes with undefined content, on the default device; to be loaded into."""
        size = packed_bytes(num_sub_vectors(out_features, in_features, vector_dim, axis), code_bits(codebook_size))
        return cls(
            torch.empty(codebooks, size, dtype=torch.uint8),
            torch.empty(codebooks, codebook_size, vector_dim, dtype=STORAGE_DTYPE),
            out_features=out_features,
            in_features=in_features,
            axis=axis,
        )

    @property
    def num_codes(self) -> int:
        """N, the sub-vectors (and codes) of one codebook."""
        return num_sub_vectors(self.out_features, self.in_features, self.codebooks.shape[2], self.axis)

    def unpacked(self) -> Tensor:
        """The codes as int32 (M, N)."""
        bits = code_bits(self.codebooks.shape[1])
        return torch.stack([unpack(codes, bits, self.num_codes) for codes in self.codes])

    def forward(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The dense weight (O, I) in `dtype`; codebooks are cast before the gather: training keeps float32 masters."""
        lines, length = self.in_features, self.out_features
        if self.axis == "in":  # the codes are (groups of inputs, outputs)
            vector_dim = self.codebooks.shape[2]
            lines, length = math.ceil(self.in_features / vector_dim), self.out_features * vector_dim
        bits = code_bits(self.codebooks.shape[1])
        books = zip(self.codebooks.to(dtype), self.codes)
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
        books = zip(self.codebooks, self.codes)
        if self.axis == "out":
            bits = code_bits(size)
            parts = (multiply(x_BI, codes, bits, book, self.out_features) for book, codes in books)
            return cast(Tensor, sum(parts)).to(x_BI.dtype)
        if code_bits(size) != 8 or len(x_BI) > 1:
            return None
        tables = (multiply_by_tables(x_BI[0], codes, book, self.out_features, exact=True) for book, codes in books)
        return cast(Tensor, sum(tables))[None]

    def ledger(self) -> dict[str, int]:
        """Stored bits: codes (those of padded rows too), codebooks, and the padding of the packed stream."""
        codes = self.codebooks.shape[0] * self.num_codes * code_bits(self.codebooks.shape[1])
        return {
            "codes": codes,
            "codebooks": self.codebooks.numel() * self.codebooks.element_size() * 8,
            "padding": self.codes.numel() * 8 - codes,
        }

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
        }

    def check(self) -> None:
        """Raise ValueError if a code points past its codebook (a damaged file)."""
        size = self.codebooks.shape[1]
        if size & (size - 1) and int(self.unpacked().max()) >= size:
            raise ValueError(f"code {int(self.unpacked().max())} exceeds the codebook of {size} centroids")


class _RebuiltLinear(torch.autograd.Function):
    """x W^T + b that keeps x and the stored form for the backward pass, never the dense W."""

    @staticmethod
    def forward(ctx, x, bias, weight, *parameters):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        ctx.save_for_backward(x, *parameters)
        return F.linear(x, weight(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x = ctx.saved_tensors[0]  # unpacking also checks that no parameter changed since the forward pass
        parameters = list(ctx.weight.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        with torch.enable_grad():
            dense_OI = ctx.weight(x.dtype)
        grad_x = grad @ dense_OI.detach() if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        grads: Iterator[Tensor] = iter(())
        if trained:
            dense_grad_OI = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            grads = iter(torch.autograd.grad(dense_OI, trained, dense_grad_OI))
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
