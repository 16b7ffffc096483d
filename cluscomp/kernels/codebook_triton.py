"""The inner loops of codebook layers on a GPU, in Triton: axis "out" of codebook.py, which says what the codes are.

Tiles are of codes: a code is found once in the packed stream (three bytes hold any code of up to 16 bits) and its
vector is read as a whole from the codebook, which the caches hold. Nothing is unpacked to memory. Where D is no power
of two, tiles are as wide as the next one, and what is beyond D stays idle.
"""

import math

import torch
import triton
import triton.language as tl

MOST_ROWS = 16  # of x: every one costs registers
SUMS, MOST_COPIES = 2**17, 64  # of a small codebook's gradient many copies are summed: who adds to one place waits


@triton.jit
def _codes(i, g, inside, packed, total, groups, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """The codes of groups g of lines i; `WHOLE`: each is a number of its own in memory."""
    at = i.to(tl.int64) * groups + g
    if WHOLE:
        code = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    else:
        byte = at * BITS >> 3
        code = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
        for n in tl.static_range(1, (BITS + 14) // 8):
            code |= tl.load(packed + byte + n, mask=inside & (byte + n < total), other=0).to(tl.int32) << 8 * n
        code = (code >> (at * BITS & 7).to(tl.int32)) & ((1 << BITS) - 1)
    return code


@triton.jit
def _real(inside, o, d, length, D: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Which entries of the tile's vectors are in the weight; `FULL`: its lines hold whole vectors."""
    if WIDTH != D or not FULL:
        inside = inside & (d < D) & (o < length)
    return inside


@triton.jit
def _decode(
    packed, total, codebook, out, lines, length, groups,
    D: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    inside = (i < lines) & (g < groups)
    code = _codes(i, g, inside, packed, total, groups, BITS, WHOLE)
    d = tl.arange(0, WIDTH)[None, None, :]
    o = g[:, :, None] * D + d
    real = _real(inside[:, :, None], o, d, length, D, WIDTH, FULL)
    value = tl.load(codebook + code[:, :, None] * D + d, mask=real, other=0)
    tl.store(out + i[:, :, None].to(tl.int64) * length + o, value, mask=real)


@triton.jit
def _multiply(
    x, B, packed, total, codebook, parts, lines, length, groups, lines_of_part,
    D: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """parts[p] = x[:, some lines] @ weight[some lines]: tiles of the weight are decoded into registers, not memory."""
    p = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    b = tl.arange(0, BATCH)[:, None]
    d = tl.arange(0, WIDTH)[None, None, :]
    o = g[:, :, None] * D + d
    y = tl.zeros([BATCH, ROWS, GROUPS, WIDTH], tl.float32)  # added up over the rows at the end
    for start in range(p * lines_of_part, (p + 1) * lines_of_part, ROWS):
        row = start + tl.arange(0, ROWS)
        i = row[:, None]
        inside = (i < lines) & (g < groups)
        code = _codes(i, g, inside, packed, total, groups, BITS, WHOLE)
        real = _real(inside[:, :, None], o, d, length, D, WIDTH, FULL)
        weight = tl.load(codebook + code[:, :, None] * D + d, mask=real, other=0).to(tl.float32)
        x_BI = tl.load(x + b * lines + row[None, :], mask=(b < B) & (row[None, :] < lines), other=0).to(tl.float32)
        y += x_BI[:, :, None, None] * weight[None, :, :, :]
    total_y = tl.sum(y, axis=1)
    inside = _real((g < groups)[:, :, None], o, d, length, D, WIDTH, FULL)
    row_b = (p.to(tl.int64) * B + b)[:, :, None] * length
    tl.store(parts + row_b + o, total_y, mask=(b < B)[:, :, None] & inside)


@triton.jit
def _scale(largest, spare):
    """A power of two by which numbers up to `largest` become whole ones below 2^spare; of zero 2^spare."""
    bits = largest.to(tl.float64).to(tl.int64, bitcast=True)
    exponent = tl.where(bits == 0, 0, (bits >> 52) - 1022)  # largest < 2^exponent
    return ((spare - exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _gradient(
    grad, step_i, step_o, largest, spare, packed, total, sums, copies, size, lines, length, groups,
    D: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds whole numbers, multiples of 1 / scale: the same sum in any order, so atomics may be used.

    Entry by entry: neighbouring threads then add to neighbouring places, which the memory takes as one.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (i < lines) & (o < length)
    code = _codes(i, o // D, inside, packed, total, groups, BITS, WHOLE)
    value = tl.load(grad + i.to(tl.int64) * step_i + o.to(tl.int64) * step_o, mask=inside, other=0)
    whole = (value.to(tl.float64) * _scale(tl.load(largest), spare)).to(tl.int64)
    place = sums + (tl.program_id(0) + tl.program_id(1)) % copies * size
    tl.atomic_add(place + code * D + o % D, whole, mask=inside, sem="relaxed")


@triton.jit
def _of_sums(sums, copies, size, largest, spare, out, BLOCK: tl.constexpr):
    """The copies of the sums added up, as numbers; all NaN where the largest is not finite."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for copy in range(copies):
        total += tl.load(sums + copy * size + n, mask=n < size, other=0)
    most = tl.load(largest).to(tl.float32)
    value = (total.to(tl.float64) / _scale(most, spare)).to(tl.float32)
    tl.store(out + n, tl.where(most < float("inf"), value, float("nan")), mask=n < size)


def decode(packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, I: int, O: int) -> torch.Tensor:
    """weight_IO in the centroids' dtype."""
    D = centroids_KD.shape[1]
    weight_IO = torch.empty(I, O, dtype=centroids_KD.dtype, device=packed.device)
    groups, width = triton.cdiv(O, D), triton.next_power_of_2(D)
    rows, columns = _tile(width, 1024)
    codes, whole = _numbers(packed, bits)
    with torch.cuda.device_of(packed):
        _decode[(triton.cdiv(I, rows), triton.cdiv(groups, columns))](
            codes, len(packed), centroids_KD.contiguous(), weight_IO, I, O, groups,
            D, width, O % D == 0, bits, whole, rows, columns,
        )  # fmt: skip
    return weight_IO


def multiply(x_BI: torch.Tensor, packed: torch.Tensor, bits: int, centroids_KD: torch.Tensor, O: int) -> torch.Tensor:
    """y_BO = x_BI @ weight_IO in float32, of up to MOST_ROWS rows of the centroids' dtype."""
    (B, I), D = x_BI.shape, centroids_KD.shape[1]
    lines_of_part = 128 if B == 1 else 64  # some thousand programs for large layers; their sums are added in order
    parts_PBO = torch.empty(triton.cdiv(I, lines_of_part), B, O, device=x_BI.device)
    groups, width, batch = triton.cdiv(O, D), triton.next_power_of_2(D), triton.next_power_of_2(B)
    rows, columns = _tile(width, max(4096 // batch, 256))
    codes, whole = _numbers(packed, bits)
    with torch.cuda.device_of(packed):
        _multiply[(len(parts_PBO), triton.cdiv(groups, columns))](
            x_BI.contiguous(), B, codes, len(packed), centroids_KD.contiguous(), parts_PBO, I, O, groups,
            lines_of_part, D, width, O % D == 0, bits, whole, batch, rows, columns,
        )  # fmt: skip
    return parts_PBO.sum(0)


def gradient(grad_IO: torch.Tensor, packed: torch.Tensor, bits: int, K: int, D: int) -> torch.Tensor:
    """gradient_KD float32, the same bits every time.

    Sums are whole multiples of about 2^-62 I O of the largest entry: float32 sums err by more. Not finite as a whole
    where an entry is not.
    """
    I, O = grad_IO.shape
    largest = torch.linalg.vector_norm(grad_IO, math.inf)
    spare = 62 - (I * O).bit_length()  # no sum reaches 2^62
    copies = max(1, min(MOST_COPIES, SUMS // (K * D)))
    sums_CKD = torch.zeros(copies, K, D, dtype=torch.int64, device=grad_IO.device)
    gradient_KD = torch.empty(K, D, device=grad_IO.device)
    codes, whole = _numbers(packed, bits)
    with torch.cuda.device_of(packed):
        _gradient[(triton.cdiv(I, 4), triton.cdiv(O, 256))](
            grad_IO, *grad_IO.stride(), largest, spare, codes, len(packed), sums_CKD, copies, K * D, I, O,
            triton.cdiv(O, D), D, bits, whole, 4, 256,
        )  # fmt: skip
        _of_sums[(triton.cdiv(K * D, 256),)](sums_CKD, copies, K * D, largest, spare, gradient_KD, 256)
    return gradient_KD


def _tile(width: int, entries: int) -> tuple[int, int]:
    """Lines and groups of a tile of so many entries (or one line of 8 groups); a group takes `width` of them."""
    groups = max(8, min(64, 256 // width))
    return max(1, entries // (groups * width)), groups


def _numbers(packed: torch.Tensor, bits: int) -> tuple[torch.Tensor, bool]:
    """The packed codes, where they are whole bytes or pairs of them as numbers, and whether they are."""
    if bits == 16 and packed.is_contiguous() and packed.storage_offset() % 2 == 0:
        return packed.view(torch.uint16), True
    return packed, bits == 8
