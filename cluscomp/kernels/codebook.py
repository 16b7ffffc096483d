"""The inner loops of codebook layers: packed codes to weights, to products, and gradients back to the codebook.

Codes are packed as in codes.py. Axis "out" (the paper's): the codes are a matrix
(I, ceil(O / D)) in rows, one code being D neighbouring outputs of one input. Axis "in": (ceil(I / D), O), one code
being D neighbouring inputs of one output.

Sums are float32 (in an order that does not depend on the number of threads). Each function has its plain torch
version beside it, `<name>_reference`, which also serves where the kernels were not compiled. Tensors on a CUDA device
stay there, all on the same one: codebook_triton.py serves them, or the plain versions where Triton is not installed.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cluscomp.kernels.codes import packed_bytes, unpack
from cluscomp.kernels.loading import native, number_of_threads, runs_triton


class _Rebuild(torch.autograd.Function):
    """Rows of sub-vectors from packed codes; the gradient adds up in float32 what each centroid gets."""

    @staticmethod
    def forward(ctx, centroids_KD, packed, bits, lines, length):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(packed)
        ctx.bits, ctx.shape, ctx.dtype = bits, centroids_KD.shape, centroids_KD.dtype
        if centroids_KD.is_meta:  # shapes alone, for the planner
            return centroids_KD.new_empty(lines, length)
        if native is not None and centroids_KD.device.type == "cpu":
            return decode(packed, bits, centroids_KD, lines, length).to(centroids_KD.dtype)
        return _decoded(packed, bits, centroids_KD, lines, length)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (packed,) = ctx.saved_tensors
        return gradient(grad, packed, ctx.bits, *ctx.shape).to(ctx.dtype), None, None, None, None


def rebuild(centroids_KD: torch.Tensor, packed: torch.Tensor, bits: int, lines: int, length: int) -> torch.Tensor:
    """`decode` in the centroids' own dtype and on their device, once differentiable in them: (lines, length).

    Raises:
        ValueError: sizes that do not agree.
    """
    return _Rebuild.apply(centroids_KD, packed, bits, lines, length)  # type: ignore[no-any-return]


def decode(
    packed: torch.Tensor,
    bits: int,
    centroids_KD: torch.Tensor,
    I: int,
    O: int,
    *,
    threads: int | None = None,
) -> torch.Tensor:
    """weight_IO float32 of axis "out" (the layer's weight_OI is its transpose, at no cost).

    Raises:
        ValueError: sizes that do not agree.
    """
    _check_packed(packed, bits, I * -(-O // centroids_KD.shape[1]))
    if native is None or packed.is_cuda:
        return _decoded(packed, bits, centroids_KD.float(), I, O)
    weight_IO = torch.empty(I, O)
    native.decode(packed.contiguous(), bits, _table(centroids_KD), weight_IO, number_of_threads(threads))
    return weight_IO


def multiply(
    x_BI: torch.Tensor,
    packed: torch.Tensor,
    bits: int,
    centroids_KD: torch.Tensor,
    O: int,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
) -> torch.Tensor:
    """y_BO = x_BI @ weight_IO, axis "out", without building the weight, in `dtype`. Meant for B below some 16.

    The CPU takes x and gives y in float32, bfloat16 or float16; sums are float32. A float16 codebook is read as such
    where possible: it is half as large, which counts at K = 65,500. On a CUDA device the weight's entries are rounded
    to x's dtype.

    Raises:
        ValueError: sizes that do not agree.
    """
    B, I = x_BI.shape
    _check_packed(packed, bits, I * -(-O // centroids_KD.shape[1]))
    if runs_triton(packed):
        from cluscomp.kernels import codebook_triton

        if 0 < B <= codebook_triton.MOST_ROWS:
            return codebook_triton.multiply(x_BI, packed, bits, centroids_KD.detach().to(x_BI.dtype), O).to(dtype)
    if native is None or packed.is_cuda:
        return multiply_reference(x_BI, packed, bits, centroids_KD, O).to(dtype)
    return Product(packed, bits, centroids_KD, O)(x_BI, dtype, threads)


class Product:
    """`multiply` by one layer on the CPU, call after call: its tensors are made ready for the compiled code once.

    Where it `shares` their memory, what changes in them is seen.
    """

    def __init__(self, packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, O: int) -> None:
        halves = centroids_KD.dtype == torch.float16 and native.takes_halves(centroids_KD.shape[1])  # type: ignore[union-attr]
        tensors = packed.contiguous(), centroids_KD.detach().contiguous() if halves else _table(centroids_KD)
        # as numpy's, which are handed over in a tenth of the time: of a small layer that counts
        self._packed, self._bits, self._table, self._O = tensors[0].numpy(), bits, tensors[1].numpy(), O
        self._places = tensors[0].data_ptr(), tensors[1].data_ptr()

    def shares(self, packed: torch.Tensor | None, centroids: torch.Tensor | None) -> bool:
        """Whether these tensors lie where its own do, whose memory it holds, so that nothing else can lie there."""
        if packed is None or centroids is None:
            return False
        return (packed.data_ptr(), centroids.data_ptr()) == self._places

    def __call__(self, x: torch.Tensor, dtype: torch.dtype, threads: int | None = None) -> torch.Tensor:
        """y = x @ weight_IO in `dtype`: (..., I) -> (..., O)."""
        y = torch.empty(*x.shape[:-1], self._O, dtype=dtype)
        if not y.numel():  # an expert that no token was sent to
            return y
        arrays = self._packed, self._bits, self._table, as_array(x.detach().contiguous()), as_array(y)
        native.multiply(*arrays, number_of_threads(threads))  # type: ignore[union-attr]
        return y


def multiply_by_tables(
    x_I: torch.Tensor,
    packed: torch.Tensor,
    centroids_KD: torch.Tensor,
    O: int,
    *,
    threads: int | None = None,
) -> torch.Tensor:
    """y_O = weight_OI @ x_I, float32, axis "in" with codes of 8 bits: products are tabled once and then looked up.

    Raises:
        ValueError: more than 256 centroids, or sizes that do not agree.
    """
    K, D = centroids_KD.shape
    if K > 256:
        raise ValueError(f"{K} centroids; look-up tables serve up to 256")
    _check_packed(packed, 8, -(-len(x_I) // D) * O)
    if native is None or packed.is_cuda:
        return multiply_by_tables_reference(x_I, packed, centroids_KD, O)
    y_O = torch.empty(O)
    native.multiply_by_tables(packed.contiguous(), _table(centroids_KD), _table(x_I), y_O, number_of_threads(threads))
    return y_O


def gradient(
    grad_IO: torch.Tensor, packed: torch.Tensor, bits: int, K: int, D: int, *, threads: int | None = None
) -> torch.Tensor:
    """gradient_KD of the codebook, given that of the weight, axis "out": the sum over all places of each code.

    Raises:
        ValueError: sizes that do not agree.
    """
    I, O = grad_IO.shape
    _check_packed(packed, bits, I * -(-O // D))
    if grad_IO.is_meta:
        return grad_IO.float().contiguous().new_empty(K, D)
    if runs_triton(packed):
        from cluscomp.kernels import codebook_triton

        return codebook_triton.gradient(grad_IO, packed, bits, K, D)
    if native is None or grad_IO.device.type != "cpu":
        return gradient_reference(grad_IO, packed, bits, K, D)
    gradient_KD = torch.empty(K, D)
    native.gradient(packed.contiguous(), bits, _table(grad_IO), gradient_KD, number_of_threads(threads))
    return gradient_KD


def _decoded(packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, I: int, O: int) -> torch.Tensor:
    """weight_IO in the centroids' dtype, where the compiled kernels do not serve."""
    if runs_triton(packed):
        from cluscomp.kernels import codebook_triton

        return codebook_triton.decode(packed, bits, centroids_KD, I, O)
    return decode_reference(packed, bits, centroids_KD, I, O)


def as_array(values: torch.Tensor) -> Any:
    """The tensor as numpy's array, which shares its memory; bfloat16, which numpy lacks, as whole numbers."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _table(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _check_packed(packed: torch.Tensor, bits: int, count: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ValueError(
            f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}; "
            f"{count} codes of {bits} bits take uint8 of shape {(packed_bytes(count, bits),)}"
        )


# ---- the same in plain torch ----


def decode_reference(packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, I: int, O: int) -> torch.Tensor:
    """`decode` by indexing, (I, O) in the centroids' dtype."""
    codes_N = unpack(packed, bits, I * -(-O // centroids_KD.shape[1]))
    return torch.nn.functional.embedding(codes_N, centroids_KD).view(I, -1)[:, :O].contiguous()


def multiply_reference(
    x_BI: torch.Tensor, packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, O: int
) -> torch.Tensor:
    """`multiply` with the whole weight: (B, O)."""
    return x_BI.float() @ decode_reference(packed, bits, centroids_KD.float(), x_BI.shape[1], O)


def multiply_by_tables_reference(
    x_I: torch.Tensor, packed: torch.Tensor, centroids_KD: torch.Tensor, O: int
) -> torch.Tensor:
    """`multiply_by_tables` with the whole weight: (O,)."""
    D = centroids_KD.shape[1]
    codes_GO = packed[: -(-len(x_I) // D) * O].long().view(-1, O)
    weight_OI = centroids_KD.float()[codes_GO].permute(1, 0, 2).reshape(O, -1)[:, : len(x_I)]
    return weight_OI @ x_I.float()


def gradient_reference(grad_IO: torch.Tensor, packed: torch.Tensor, bits: int, K: int, D: int) -> torch.Tensor:
    """`gradient` by index_add_: (K, D)."""
    I, O = grad_IO.shape
    G = -(-O // D)
    padded = torch.nn.functional.pad(grad_IO.float(), (0, G * D - O)).reshape(I * G, D)
    gradient_KD = torch.zeros(K, D, device=grad_IO.device)
    return gradient_KD.index_add_(0, unpack(packed, bits, I * G), padded)
