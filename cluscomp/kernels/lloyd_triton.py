"""Exact nearest centroids and sums of clusters on a GPU, in Triton.

A distance here is the float32 sum of squared differences, added coordinate by coordinate with fused multiply-adds (the
same bits in every kernel below), and the lowest number wins a tie. Of the kernels that search

* `_screen` ranks all centroids by one tensor core product, in tiles, keeps the best tile of each point and says
  whether that tile is proven to hold the nearest centroid (shown below); what remains is one maximum an element;
* `_within_tile` takes the nearest centroid of the tile found, by distances;
* `_by_all` goes by all distances, the tiles shared out among several programs: for few centroids, for few points, and
  for those `_screen` is not sure of;
* `_by_boxes` starts from the present centroid of each point and leaves out every tile whose bounding box lies farther
  away than the best centroid so far, first of the box of the points at hand, then of each of them. Few tiles remain
  where D is small, the points lie sorted by cluster and the centroids in spatial order: at D = 4 some 200 distances a
  point, almost whatever K is. (Sorted lists of each centroid's neighbours leave out more, but on a GPU building all
  lists costs more than a whole search.)

Why `_screen` is exact. Nearest is largest score s = x.c - |c|^2 / 2. All is scaled by a power of two, so that
coordinates are within 2^12, and split into two halves hi + lo, and |c|^2 / 2 into three:

    (x hi, x lo, x hi, 2^13, 2^13, 2^13) . (c hi, c hi, c lo, -h0, -h1, -h2),      |c|^2 / 2 = 2^13 (h0 + h1 + h2)

With u = 2^-11, the rounding of a half, and 2^-25, that of its smallest ones: each coordinate is off by at most
u^2 |v| + 2^-24, so each product by 3.01 u^2 |x_d c_d| + 2^-11, and the h by 2^-10. Products of halves are exact in
float32; adding S of them, also where the hardware cuts off instead of rounding, errs by at most S 2^-22 of the sum of
their sizes. Hence a score is off by at most eta B + alpha, with B = |x| |c| + |c|^2 / 2, eta = (S + 8) 2^-22 and
alpha = (D + 4) 2^-11.

Let j have the largest computed score, M, and k be the nearest centroid by float32 distances, which are off by a part
gamma <= (D + 2) 2^-24 < eta / 12. Then d_k^2 <= (1 + 3 gamma) d_j^2 in real numbers, so s_k >= s_j - 1.5 gamma d_j^2,
and the computed score of k is at least M - eta (B_k + B_j) - 2 alpha - 1.5 gamma d_j^2. As |c| <= |x| + d,
B <= 2.5 |x|^2 + 1.5 d^2; and d_j^2 <= q = |x|^2 (1 + 6 eta) - 2 M + 2 alpha, up to a part 4 eta. So k's tile has a
score of at least M - delta, delta = eta (5 |x|^2 + 4 q) + 2 alpha. Where only one tile has such a score, it is k's.

Why `_by_boxes` is exact: the squared distance to a box, from a box or a point, is no larger than that to anything in
it; both are off by less than a part 1e-5 in float32, so a tile at more than 1.0001 of the best distance is out.
"""

import math

import torch
import triton
import triton.language as tl

LARGEST_D = 32  # sub-vectors are short: loops over coordinates are unrolled
TILE = 64  # centroids that are ranked together
SCREENED = 256  # from so many centroids on the screen pays, and from so much work (experiments/21-gpu.md):
FEW = 3 * 2**30  # coordinates of all differences
PROGRAMS = 1024  # that share a search out: several for each multiprocessor
LEAF = 16  # centroids of one box, and boxes of one group
FAR = 1e18  # of centroids that fill up the last tile: beyond all real ones, and its square is finite


@triton.jit
def _squares(points, row_N, inside_N, centroids, at, columns, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Squared distances (BLOCK, TILE) of some points to the centroids `at`, (1, TILE) or (BLOCK, TILE)."""
    total = tl.zeros([BLOCK, TILE], tl.float32)
    for d in tl.static_range(D):
        x_N = tl.load(points + row_N * D + d, mask=inside_N, other=0).to(tl.float32)
        difference = x_N[:, None] - tl.load(centroids + d * columns + at)
        total = tl.fma(difference, difference, total)
    return total


@triton.jit
def _by_all(
    points, N, centroids, columns, tiles_of_part, keys, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """The nearest centroid of each of BLOCK points in one part of the tiles; the least key of all parts is left.

    A key is the distance's bits, which rise as it does, and below them the centroid: the lowest of equals is least.
    """
    row_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_N = row_N < N
    first = tl.program_id(1) * tiles_of_part
    best_N = tl.full([BLOCK], float("inf"), tl.float32)
    winner_N = tl.zeros([BLOCK], tl.int32) + first
    for t in range(first, tl.minimum(first + tiles_of_part, columns // TILE)):
        at = t * TILE + tl.arange(0, TILE)[None, :]
        least_N = tl.min(_squares(points, row_N, inside_N, centroids, at, columns, D, BLOCK, TILE), axis=1)
        winner_N = tl.where(least_N < best_N, t, winner_N)
        best_N = tl.minimum(best_N, least_N)
    at = winner_N[:, None] * TILE + tl.arange(0, TILE)[None, :]
    squares = _squares(points, row_N, inside_N, centroids, at, columns, D, BLOCK, TILE)
    code_N = tl.min(tl.where(squares == tl.min(squares, axis=1)[:, None], at, columns), axis=1)
    key_N = (best_N.to(tl.int32, bitcast=True).to(tl.int64) << 32) | code_N
    tl.atomic_min(keys + row_N, key_N, mask=inside_N, sem="relaxed")


@triton.jit
def _within_tile(
    points, N, centroids, columns, tile_N, codes, distances, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """The nearest centroid of each point's tile, and its distance."""
    row_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_N = row_N < N
    at = tl.load(tile_N + row_N, mask=inside_N, other=0)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    squares = _squares(points, row_N, inside_N, centroids, at, columns, D, BLOCK, TILE)
    least_N = tl.min(squares, axis=1)
    tl.store(codes + row_N, tl.min(tl.where(squares == least_N[:, None], at, columns), axis=1), mask=inside_N)
    tl.store(distances + row_N, least_N, mask=inside_N)


@triton.jit
def _screen(
    points, N, scale, rows_KS, tiles, tile_N, sure, D: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The tile with the largest score of each of BLOCK points, and whether the nearest centroid must be in it."""
    row_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_N = row_N < N
    slot = tl.arange(0, S)[None, :]
    real = inside_N[:, None] & (slot < 3 * D)
    x = tl.load(points + row_N[:, None] * D + slot % D, mask=real, other=0).to(tl.float32) * scale
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    left = tl.where((slot >= D) & (slot < 2 * D), low, high)
    left = tl.where((slot >= 3 * D) & (slot < 3 * D + 3), 8192.0, left).to(tl.float16)
    best_N = tl.full([BLOCK], float("-inf"), tl.float32)
    second_N = tl.full([BLOCK], float("-inf"), tl.float32)
    winner_N = tl.zeros([BLOCK], tl.int32)
    for t in range(tiles):
        k = t * TILE + tl.arange(0, TILE)[None, :]
        right = tl.load(rows_KS + k * S + tl.arange(0, S)[:, None])
        most_N = tl.max(tl.dot(left, right), axis=1)
        second_N = tl.maximum(second_N, tl.minimum(best_N, most_N))
        winner_N = tl.where(most_N > best_N, t, winner_N)
        best_N = tl.maximum(best_N, most_N)
    length_N = tl.sum(tl.where(slot < D, x * x, 0.0), axis=1)
    eta = (S + 8) * 2.0**-22
    alpha = (D + 4) * 2.0**-11
    q_N = length_N * (1 + 6 * eta) - 2 * best_N + 2 * alpha
    delta_N = eta * (5 * length_N + 4 * q_N) + 2 * alpha
    tl.store(tile_N + row_N, winner_N, mask=inside_N)
    tl.store(sure + row_N, (second_N < best_N - delta_N).to(tl.int8), mask=inside_N)


@triton.jit
def _gap(lower, upper, low_D, high_D, d, D: tl.constexpr):
    """Squared distance of a box in memory to the one at hand."""
    apart_D = tl.maximum(
        tl.load(lower + d, mask=d < D, other=0) - high_D, low_D - tl.load(upper + d, mask=d < D, other=0)
    )
    apart_D = tl.where(d < D, tl.maximum(apart_D, 0.0), 0.0)
    return tl.sum(apart_D * apart_D)


@triton.jit
def _any_near(lower, upper, points, row_N, inside_N, best_N, D: tl.constexpr, BLOCK: tl.constexpr):
    """1 where the box in memory may hold a nearer centroid of any of the points, else 0."""
    gap_N = tl.zeros([BLOCK], tl.float32)
    for d in tl.static_range(D):
        x_N = tl.load(points + row_N * D + d, mask=inside_N, other=0).to(tl.float32)
        apart_N = tl.maximum(tl.maximum(tl.load(lower + d) - x_N, x_N - tl.load(upper + d)), 0.0)
        gap_N += apart_N * apart_N
    return tl.max((inside_N & (gap_N <= best_N * 1.0001)).to(tl.int32))


@triton.jit
def _by_boxes(
    points, present, N, centroids, columns, leaf_low, leaf_high, group_low, group_high, codes, distances,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """The nearest centroid of each of BLOCK neighbouring points, given any centroid (a near one) to start from."""
    row_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_N = row_N < N
    code_N = tl.load(present + row_N, mask=inside_N, other=0)
    best_N = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(D):
        x_N = tl.load(points + row_N * D + i, mask=inside_N, other=0).to(tl.float32)
        difference_N = x_N - tl.load(centroids + i * columns + code_N)
        best_N = tl.fma(difference_N, difference_N, best_N)
    worst = tl.max(tl.where(inside_N, best_N, 0.0)) * 1.0001
    d = tl.arange(0, WIDTH)
    within = inside_N[:, None] & (d < D)[None, :]
    at = points + row_N[:, None] * D + d[None, :]
    low_D = tl.min(tl.load(at, mask=within, other=float("inf")).to(tl.float32), axis=0)
    high_D = tl.max(tl.load(at, mask=within, other=float("-inf")).to(tl.float32), axis=0)
    for g in range(columns // (LEAF * LEAF)):
        if _gap(group_low + g * D, group_high + g * D, low_D, high_D, d, D) <= worst:
            for t in range(g * LEAF, g * LEAF + LEAF):
                low, high = leaf_low + t * D, leaf_high + t * D
                if _gap(low, high, low_D, high_D, d, D) <= worst:  # noqa: SIM102 (Triton's `and` computes both sides)
                    if _any_near(low, high, points, row_N, inside_N, best_N, D, BLOCK):
                        k = t * LEAF + tl.arange(0, LEAF)[None, :]
                        squares = _squares(points, row_N, inside_N, centroids, k, columns, D, BLOCK, LEAF)
                        least_N = tl.min(squares, axis=1)
                        first_N = tl.min(tl.where(squares == least_N[:, None], k, columns), axis=1)
                        nearer_N = (least_N < best_N) | ((least_N == best_N) & (first_N < code_N))
                        code_N = tl.where(nearer_N, first_N, code_N)
                        best_N = tl.minimum(best_N, least_N)
                        worst = tl.max(tl.where(inside_N, best_N, 0.0)) * 1.0001
    tl.store(codes + row_N, code_N, mask=inside_N)
    tl.store(distances + row_N, best_N, mask=inside_N)


@triton.jit
def _moments(points, weights, begin, moments, D: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Of points first...last-1 of one cluster and one coordinate: mass, weighted sum and sum of squares, float64."""
    k, d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(begin + k), tl.load(begin + k + 1)
    mass_N = tl.zeros([BLOCK], tl.float64)
    sum_N = tl.zeros([BLOCK], tl.float64)
    square_N = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        row_N = start + tl.arange(0, BLOCK)
        inside_N = row_N < last
        x_N = tl.load(points + row_N * D + d, mask=inside_N, other=0).to(tl.float64)
        w_N = inside_N.to(tl.float64)
        if WEIGHTED:
            w_N = tl.load(weights + row_N, mask=inside_N, other=0).to(tl.float64)
        mass_N += w_N
        sum_N += w_N * x_N
        square_N += w_N * x_N * x_N
    out = moments + k * (1 + 2 * D)
    if d == 0:
        tl.store(out, tl.sum(mass_N))
    tl.store(out + 1 + d, tl.sum(sum_N))
    tl.store(out + 1 + D + d, tl.sum(square_N))


@triton.jit
def _rows(points, row_n, out, size, D: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_n + at // D, mask=at < size, other=0)
    tl.store(out + at, tl.load(points + row * D + at % D, mask=at < size, other=0), mask=at < size)


def assign(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.lloyd.assign` of checked points (float32, bfloat16 or float16) and float32 centroids, D <= LARGEST_D."""
    (N, D), K = points_ND.shape, len(centroids_KD)
    if K < SCREENED or N * K * D < FEW:
        return by_all(points_ND, centroids_KD)
    table_DK = _table(centroids_KD, TILE)
    tile_N, sure_N = screen(points_ND, centroids_KD)
    codes_N, distances_N = _results(points_ND)
    with torch.cuda.device_of(points_ND):
        _within_tile[(triton.cdiv(N, 32),)](
            points_ND, N, table_DK, table_DK.shape[1], tile_N, codes_N, distances_N, D, 32, TILE
        )
    doubtful_n = (sure_N == 0).nonzero().flatten()
    if len(doubtful_n):
        codes_N[doubtful_n], distances_N[doubtful_n] = by_all(rows(points_ND, doubtful_n), centroids_KD)
    return codes_N, distances_N


def by_all(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`assign` by all distances, exact, too: codes (N,) int32, distances (N,) float32."""
    (N, D), table_DK = points_ND.shape, _table(centroids_KD, TILE)
    blocks, tiles = triton.cdiv(N, 64), table_DK.shape[1] // TILE
    tiles_of_part = triton.cdiv(tiles, max(1, min(PROGRAMS // blocks, tiles // 4)))
    keys_N = torch.full((N,), torch.iinfo(torch.int64).max, device=points_ND.device)
    with torch.cuda.device_of(points_ND):
        _by_all[(blocks, triton.cdiv(tiles, tiles_of_part))](
            points_ND, N, table_DK, table_DK.shape[1], tiles_of_part, keys_N, D, 64, TILE
        )
    halves_N2 = keys_N.view(torch.int32).view(N, 2)  # of a little-endian machine
    return halves_N2[:, 0].contiguous(), halves_N2[:, 1].contiguous().view(torch.float32)


def assign_near(
    points_ND: torch.Tensor, centroids_KD: torch.Tensor, present_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, fast where D is small, neighbouring points have neighbouring codes `present_N` (int32) and the
    centroids are in spatial order; exact in any case."""
    (N, D), K = points_ND.shape, len(centroids_KD)
    table_DK = _table(centroids_KD, LEAF * LEAF)
    filled_KD = centroids_KD[torch.arange(table_DK.shape[1], device=centroids_KD.device).clamp(max=K - 1)]
    leaves, groups = filled_KD.view(-1, LEAF, D), filled_KD.view(-1, LEAF * LEAF, D)
    codes_N, distances_N = _results(points_ND)
    with torch.cuda.device_of(points_ND):
        _by_boxes[(triton.cdiv(N, 32),)](
            points_ND, present_N, N, table_DK, table_DK.shape[1], leaves.amin(1), leaves.amax(1), groups.amin(1),
            groups.amax(1), codes_N, distances_N, D, triton.next_power_of_2(D), 32, LEAF, num_warps=1,
        )  # fmt: skip
    return codes_N, distances_N


def rows(points_ND: torch.Tensor, row_n: torch.Tensor) -> torch.Tensor:
    """points_ND[row_n]: torch has a program for each row where one takes 16 bytes, and needs ten times as long."""
    (_, D), n = points_ND.shape, len(row_n)
    out_nD = torch.empty(n, D, dtype=points_ND.dtype, device=points_ND.device)
    if n:
        with torch.cuda.device_of(points_ND):
            _rows[(triton.cdiv(n * D, 1024),)](points_ND, row_n, out_nD, n * D, D, 1024)
    return out_nD


def moments(sorted_ND: torch.Tensor, weights_N: torch.Tensor | None, begin_K: torch.Tensor) -> torch.Tensor:
    """Mass, sums and sums of squares, (K, 1 + 2D) float64, of points that lie sorted: those of k from begin_K[k] on.

    begin_K is int64 with K + 1 entries. Sums are formed in a fixed order: no atomics.
    """
    K, D = len(begin_K) - 1, sorted_ND.shape[1]
    out = torch.empty(K, 1 + 2 * D, dtype=torch.float64, device=sorted_ND.device)
    with torch.cuda.device_of(sorted_ND):
        _moments[(K, D)](sorted_ND, weights_N, begin_K, out, D, weights_N is not None, 128, num_warps=1)
    return out


def screen(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likely tile of each point's nearest centroid (int32), and 1 where it is proven (int8); see above."""
    (N, D), device = points_ND.shape, points_ND.device
    S = triton.next_power_of_2(max(3 * D + 3, 16))
    largest = max(float(torch.linalg.vector_norm(rows, math.inf)) for rows in (points_ND, centroids_KD))
    scale = 2.0 ** min(
        12 - math.frexp(largest)[1], 50
    )  # at most 2^50: so squares too small for float32 stay below alpha
    c_KD = centroids_KD * scale
    high_KD = c_KD.half()
    rest_K = c_KD.double().square().sum(1) / 2**14
    halves = []
    for _ in range(3):
        halves.append(rest_K.half())
        rest_K = rest_K - halves[-1].double()
    rows_KS = torch.zeros(-(-len(c_KD) // TILE) * TILE, S, dtype=torch.float16, device=device)
    rows_KS[:, 3 * D : 3 * D + 3] = -60000.0  # what fills up the last tile scores below all real ones
    rows_KS[: len(c_KD), : 3 * D] = torch.cat([high_KD, high_KD, (c_KD - high_KD.float()).half()], dim=1)
    rows_KS[: len(c_KD), 3 * D : 3 * D + 3] = -torch.stack(halves, dim=1)
    tile_N = torch.empty(N, dtype=torch.int32, device=device)
    sure_N = torch.empty(N, dtype=torch.int8, device=device)
    with torch.cuda.device_of(points_ND):
        _screen[(triton.cdiv(N, 128),)](
            points_ND, N, scale, rows_KS, len(rows_KS) // TILE, tile_N, sure_N, D, S, 128, TILE
        )
    return tile_N, sure_N


def _results(points_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N, device = len(points_ND), points_ND.device
    return torch.empty(N, dtype=torch.int32, device=device), torch.empty(N, device=device)


def _table(centroids_KD: torch.Tensor, multiple: int) -> torch.Tensor:
    """The centroids' coordinates in rows, so that lanes read neighbours, filled up to a multiple of centroids."""
    K = len(centroids_KD)
    return torch.nn.functional.pad(centroids_KD.t(), (0, -K % multiple), value=FAR).contiguous()
