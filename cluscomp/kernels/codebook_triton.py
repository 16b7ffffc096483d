"""The inner loops of codebook layers on a GPU, in Triton: axis "out" of codebook.py, which says what the codes are.

Every entry of a weight finds its own code in the packed stream (three bytes hold any code of up to 16 bits) and reads
its place in the codebook, which the caches hold: nothing is unpacked to memory.
"""

import math

import torch
import triton
import triton.language as tl

MOST_ROWS = 16  # of x: the smallest tile of a tensor core


@triton.jit
def _entries(i, o, lines, length, packed, total, groups, bits, D: tl.constexpr):
    """Where entries (i, o) of the weight stand in the codebook; 0 outside of the weight."""
    inside = (i < lines) & (o < length)
    bit = (i.to(tl.int64) * groups + o // D) * bits
    byte = bit >> 3
    window = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    window |= tl.load(packed + byte + 1, mask=inside & (byte + 1 < total), other=0).to(tl.int32) << 8
    window |= tl.load(packed + byte + 2, mask=inside & (byte + 2 < total), other=0).to(tl.int32) << 16
    code = (window >> (bit & 7).to(tl.int32)) & ((1 << bits) - 1)
    return tl.where(inside, code * D + o % D, 0), inside


@triton.jit
def _decode(
    packed,
    total,
    bits,
    codebook,
    out,
    lines,
    length,
    groups,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    entry, inside = _entries(i, o, lines, length, packed, total, groups, bits, D)
    tl.store(out + i.to(tl.int64) * length + o, tl.load(codebook + entry, mask=inside, other=0), mask=inside)


@triton.jit
def _multiply(
    x, B, packed, total, bits, codebook, parts, lines, length, groups, lines_of_part,
    D: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts[p] = x[:, some lines] @ weight[some lines]: tiles of the weight are decoded into registers, not memory."""
    p = tl.program_id(0)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.arange(0, BATCH)[:, None]
    y = tl.zeros([BATCH, COLUMNS], tl.float32)
    for start in range(p * lines_of_part, (p + 1) * lines_of_part, ROWS):
        i = start + tl.arange(0, ROWS)
        entry, inside = _entries(i[:, None], o, lines, length, packed, total, groups, bits, D)
        weight = tl.load(codebook + entry, mask=inside, other=0)
        x_BI = tl.load(x + b * lines + i[None, :], mask=(b < B) & (i[None, :] < lines), other=0)
        y = tl.dot(x_BI, weight, y, input_precision="ieee")
    tl.store(parts + (p.to(tl.int64) * B + b) * length + o, y, mask=(b < B) & (o < length))


@triton.jit
def _gradient(
    grad, step_i, step_o, scale, packed, total, bits, sums, lines, length, groups,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds whole multiples of 1 / scale: whole numbers give the same sum in any order, so atomics may be used."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    entry, inside = _entries(i, o, lines, length, packed, total, groups, bits, D)
    value = tl.load(grad + i.to(tl.int64) * step_i + o.to(tl.int64) * step_o, mask=inside, other=0)
    tl.atomic_add(sums + entry, (value.to(tl.float64) * tl.load(scale)).to(tl.int64), mask=inside, sem="relaxed")


def decode(packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, I: int, O: int) -> torch.Tensor:
    """weight_IO in the centroids' dtype."""
    D = centroids_KD.shape[1]
    weight_IO = torch.empty(I, O, dtype=centroids_KD.dtype, device=packed.device)
    with torch.cuda.device_of(packed):
        _decode[(triton.cdiv(I, 8), triton.cdiv(O, 128))](
            packed, len(packed), bits, centroids_KD.contiguous(), weight_IO, I, O, triton.cdiv(O, D), D, 8, 128
        )
    return weight_IO


def multiply(x_BI: torch.Tensor, packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, O: int) -> torch.Tensor:
    """y_BO = x_BI @ weight_IO in float32, of up to MOST_ROWS rows of the centroids' dtype."""
    (B, I), D = x_BI.shape, centroids_KD.shape[1]
    lines_of_part = 128  # a few hundred programs for the layers of language models; their sums are added in order
    parts_PBO = torch.empty(triton.cdiv(I, lines_of_part), B, O, device=x_BI.device)
    with torch.cuda.device_of(packed):
        _multiply[(len(parts_PBO), triton.cdiv(O, 64))](
            x_BI.contiguous(), B, packed, len(packed), bits, centroids_KD.contiguous(), parts_PBO, I, O,
            triton.cdiv(O, D), lines_of_part, D, MOST_ROWS, 32, 64,
        )  # fmt: skip
    return parts_PBO.sum(0)


def gradient(grad_IO: torch.Tensor, packed: torch.Tensor, bits: int, K: int, D: int) -> torch.Tensor:
    """gradient_KD float32, the same bits every time.

    Sums are whole multiples of about 2^-62 I O of the largest entry: float32 sums err by more. Not finite as a whole
    where an entry is not.
    """
    I, O = grad_IO.shape
    largest = torch.linalg.vector_norm(grad_IO, math.inf).double()
    exponent = 62 - (I * O).bit_length() - torch.frexp(largest).exponent  # no sum reaches 2^62
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    sums_KD = torch.zeros(K, D, dtype=torch.int64, device=grad_IO.device)
    with torch.cuda.device_of(packed):
        _gradient[(triton.cdiv(I, 32), triton.cdiv(O, 32))](
            grad_IO, *grad_IO.stride(), scale, packed, len(packed), bits, sums_KD, I, O, triton.cdiv(O, D), D, 32, 32
        )
    return (sums_KD / torch.where(largest.isfinite(), scale, math.nan)).float()
