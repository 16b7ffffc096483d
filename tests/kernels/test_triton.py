"""The kernels for GPUs: on one where there is one, else on the CPU in Triton's interpreter (set up in conftest)."""

import os
import subprocess
import sys
from itertools import cycle, product

import numpy as np
import pytest
import torch
from reference import kd_lloyd
from reference.lloyd import distances
from test_codebook_kernels import LAYERS, layer

pytest.importorskip("triton", reason="Triton is not installed")
from cluscomp.forms import codebook as form
from cluscomp.forms.linear import CompressedLinear
from cluscomp.kernels import codebook, codebook_triton, lloyd_torch, lloyd_triton
from cluscomp.kernels.lloyd import BEST, REFERENCE, assign, lloyd
from cluscomp.kernels.lloyd_torch import assign_reference
from cluscomp.solve.kmeans import Recipe, kmeans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# The interpreter is slow: there each shape comes with one dtype, in turn, and of like sizes one stands for all.
ALL = DEVICE == "cuda"


def each(values, dtypes):
    """Pairs of both: all of them on a GPU, else each value once."""
    return list(product(values, dtypes) if ALL else zip(values, cycle(dtypes)))


def points(N, D, seed=0):
    """Heavy-tailed points: normal with a log-normal size each."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, D, generator=g) * torch.exp(0.7 * torch.randn(N, 1, generator=g))).to(DEVICE)


def grid(N, D, levels, seed=0):
    """Points whose distances are exact, many of them equal."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (N, D), generator=g).float().to(DEVICE)


def table(x, c):
    return distances(x.float().cpu().numpy(), c.cpu().numpy())


def first_nearest(x, c):
    return table(x, c).argmin(1)  # numpy: the first of equals


def assert_nearest(x, c, codes, found):
    """Nearest but for float32's rounding of the squares; the distances are those of the codes."""
    true = table(x, c)
    assert (true[np.arange(len(x)), codes.cpu().numpy()] <= true.min(1) * (1 + 1e-5)).all()
    np.testing.assert_allclose(found.cpu().numpy(), true.min(1), rtol=1e-5)


def near(x, c, sort=True):
    """`assign_near` as the loop calls it: centroids in spatial order, points sorted by nearly right codes."""
    present = assign_reference(x, c + 0.05 * c.std())[0]
    order = present.argsort(stable=True) if sort else torch.arange(len(x), device=DEVICE)
    codes, found = lloyd_triton.assign_near(x[order], c, present[order])
    back = order.argsort()
    return codes[back], found[back]


@pytest.fixture(params=["plain", "triton"])
def way(request, monkeypatch):
    """The loop of lloyd_torch.py, on plain torch and on the kernels."""
    monkeypatch.setattr(lloyd_torch, "runs_triton", lambda _: request.param == "triton")
    monkeypatch.setattr(lloyd_torch, "assign_faiss", assign_reference)  # what a GPU without Triton takes
    return request.param


WAYS = {"screen": 0, "all distances": 2**40}  # that `assign` goes where there are enough centroids, by FEW


@pytest.fixture(params=WAYS)
def by(request, monkeypatch):
    """One of the ways."""
    monkeypatch.setattr(lloyd_triton, "FEW", WAYS[request.param])


@pytest.mark.parametrize(
    "K,D", [(2, 1), (65, 1), (2, 4), (65, 9), (300, 16)] + [(300, D) for D in (range(1, 10) if ALL else (1, 3, 4))]
)
def test_every_point_gets_its_nearest_centroid(K, D):
    x = points(33, D)
    c = points(K, D, seed=1)
    c = c[lloyd_torch.spatial_order(c)]
    assert_nearest(x, c, *lloyd_triton.assign(x, c))
    assert_nearest(x, c, *near(x, c))


@pytest.mark.parametrize("D,K", [(1, 200), (4, 200), (17, 70)])
def test_ties_go_to_the_lowest_number(D, K):
    x, c = grid(40, D, 2), grid(K, D, 2, seed=1)
    c = torch.cat([c, c[: K // 2]])  # equal ones in other tiles
    expected = first_nearest(x, c)
    np.testing.assert_array_equal(lloyd_triton.assign(x, c)[0].cpu(), expected)
    np.testing.assert_array_equal(near(x[:20], c, sort=False)[0].cpu(), expected[:20])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_points_are_as_their_float32_values(dtype, by):
    x, c = points(20, 3).to(dtype), points(330, 3, seed=1)
    for search, few in ((lloyd_triton.assign, c), (near, c[:200])):
        assert all(torch.equal(*pair) for pair in zip(search(x, few), search(x.float(), few)))


def hard(kind, D=4):
    """Points and centroids that halves cannot tell apart, or cannot hold."""
    x, c = points(130, D), points(330, D, seed=1)
    if kind == "far from zero":
        return x / 64 + 1000, c / 64 + 1000
    if kind == "huge and tiny":
        return torch.cat([x[:60] * 1e14, x[60:] * 1e-20]), torch.cat([c[:100] * 1e13, c[100:] * 1e-20])
    if kind == "tiny":
        return x * 1e-25, c * 1e-25  # squares are zero in float32
    if kind == "zero":
        return x * 0, c * 0
    return x, torch.cat([x[:50], torch.nextafter(x[:50], x[:50] * 2), c])  # neighbouring floats


@pytest.mark.parametrize("kind", ["far from zero", "huge and tiny", "tiny", "zero", "neighbouring floats"])
def test_the_screen_claims_no_more_than_it_knows(kind, monkeypatch):
    """What it leaves open, or all, goes by all distances."""
    x, c = hard(kind)
    expected, least = assign_reference(x, c)
    tile, sure = lloyd_triton.screen(x, c)
    sure = sure.bool()
    assert (tile == expected // lloyd_triton.TILE)[sure].all()
    if kind == "far from zero":
        assert (tile != expected // lloyd_triton.TILE).any(), "the example must be too hard for the screen alone"
    for few in WAYS.values():
        monkeypatch.setattr(lloyd_triton, "FEW", few)
        codes, found = lloyd_triton.assign(x, c)
        assert torch.allclose(found, least, rtol=1e-6, atol=0)
        assert torch.allclose((x - c[codes.long()]).square().sum(1), least, rtol=1e-6, atol=0)
        if kind in ("tiny", "zero"):
            assert not codes.any()


@pytest.mark.parametrize("D", [2, 4, 9, 20])
def test_the_screen_is_sure_of_ordinary_points(D):
    x, c = points(256, D), points(4096 if D == 4 else 1500, D, seed=1)
    expected, _ = assign_reference(x, c)
    tile, sure = lloyd_triton.screen(x, c)
    assert (tile == expected // lloyd_triton.TILE)[sure.bool()].all()
    assert sure.float().mean() > 0.8


@pytest.mark.parametrize("N,K,D", [(1, 1, 3), (70, 1100, 2), (130, 700, 5), (3, 700, 32)])
def test_all_distances_in_parts_are_as_in_one(N, K, D, monkeypatch):
    x, c = grid(N, D, 3), grid(K, D, 3, seed=1)
    expected = assign_reference(x, c)
    for programs in (1, 8, 1024):
        monkeypatch.setattr(lloyd_triton, "PROGRAMS", programs)
        for plain, found in zip(expected, lloyd_triton.by_all(x, c)):
            assert found.dtype == plain.dtype and torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,D", [(0, 4), (1, 1), (700, 4), (500, 9)])
def test_rows_are_indexing(n, D, dtype):
    x = points(300, D).to(dtype)
    row = torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)).to(DEVICE)
    assert torch.equal(lloyd_triton.rows(x, row), x[row])


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_boxes_are_exact_from_any_start(shift):
    x, c = points(33, 3) + shift, points(300, 3, seed=1) + shift
    anything = torch.randint(0, 300, (33,), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(DEVICE)
    codes, found = lloyd_triton.assign_near(x, c, anything)
    assert_nearest(x, c, codes, found)


@pytest.mark.parametrize("D", [1, 3])
def test_boxes_that_do_not_touch_are_searched_where_they_must_be(D):
    """Points half way between two leaves, the nearer centroid not in that of the present one."""
    c = torch.zeros(300, D)
    c[:, 0] = torch.arange(300.0)
    border = 16 * torch.arange(1, 7).repeat_interleave(32)
    side = torch.rand(len(border), generator=torch.Generator().manual_seed(0)) - 0.5
    side[:100:5] = 0  # a tie, which the lower number wins; where all of a block are ties, so does its box
    side[160:] = 0
    x = 1e-3 * torch.ones(len(border), D)
    x[:, 0] = border - 0.5 + 1e-2 * side
    for present in (border, border - 1, border + 20):
        given = (t.to(DEVICE) for t in (x, c, present.int()))
        codes, _ = lloyd_triton.assign_near(*given)
        assert torch.equal(codes.cpu(), (border - (side <= 0).long()).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_sums_over_runs(weighted, dtype, way):
    x = points(700, 3).to(dtype)
    w = points(700, 1).abs().flatten() if weighted else None
    begin = torch.tensor([0, 0, 1, 130, 130, 700], device=DEVICE)
    found = lloyd_torch._moments(x, w, begin)
    mass, wide = torch.ones(700, device=DEVICE).double() if w is None else w.double(), x.double()
    for k, (a, b) in enumerate(zip(begin[:-1], begin[1:])):
        some = mass[a:b], *(mass[a:b, None] * wide[a:b] ** p for p in (1, 2))
        expected = torch.cat([some[0].sum()[None], some[1].sum(0), some[2].sum(0)])
        torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("K", [1, 16, 17, 300, 1024])
def test_spatial_order_is_an_order_and_spatial(K):
    c = points(K, 1)
    order = lloyd_torch.spatial_order(c)
    assert torch.equal(order.sort().values.cpu(), torch.arange(K))
    leaves = c[order, 0].split(lloyd_torch.LEAF)  # in one dimension: a cut of the sorted values
    assert all(a.max() <= b.min() for a, b in zip(leaves, leaves[1:]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("N,K,D", [(3, 3, 2), (150, 11, 3), (900, 50, 9), (300, 290, 2)])
def test_kd_is_the_plain_one(N, K, D, weighted, way):
    if way == "triton" and K > 11 and DEVICE == "cpu":
        pytest.skip("slow in the interpreter")
    x = points(N, D)
    w = points(N, 1, seed=2).abs().flatten() if weighted else None
    for seed in (2**64 - 1,) if way == "triton" and DEVICE == "cpu" else (0, 1, 2**64 - 1):
        c, codes, rows = lloyd_torch.kd(x, K, w, seed)
        expected = kd_lloyd.kd(x.cpu(), K, None if w is None else w.cpu(), seed)
        torch.testing.assert_close(c.cpu(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(rows.sort().values.cpu(), torch.arange(N)) and torch.equal(codes, codes.sort().values)
        mass = torch.ones(N, device=DEVICE) if w is None else w
        code = int(codes[N // 2])
        of_one = rows[codes == code]
        mean = (mass[of_one, None].double() * x[of_one].double()).sum(0) / mass[of_one].double().sum()
        torch.testing.assert_close(c[code], mean.float(), rtol=1e-5, atol=1e-6)


def test_kd_cuts_at_the_mean_where_the_moved_cut_leaves_a_side_empty(way):
    x = torch.zeros(2000, 2, device=DEVICE)
    x[7, 1] = 1
    for values in (x, 1 - x):
        for seed in range(3 if way == "triton" and DEVICE == "cpu" else 20):
            c, _, _ = lloyd_torch.kd(values, 2, None, seed)
            assert torch.equal(c.cpu(), kd_lloyd.kd(values.cpu(), 2, None, seed))
            assert not torch.equal(c[0], c[1])


def test_kd_gives_equal_points_and_points_without_weight_to_one_piece(way):
    x = torch.cat([torch.ones(50, 2), torch.zeros(50, 2), torch.full((20, 2), 3.0)]).to(DEVICE)
    w = torch.cat([torch.ones(100), torch.zeros(20)]).to(DEVICE)
    for mass in (None, w):
        c, codes, _ = lloyd_torch.kd(x, 30, mass, 0)
        assert torch.equal(c.cpu(), kd_lloyd.kd(x.cpu(), 30, None if mass is None else mass.cpu(), 0))
        assert len(codes.unique()) == 3


@pytest.mark.parametrize("recipe", ["best", "reference", "given"])
@pytest.mark.parametrize(
    "N,K,D,weighted", [(90, 6, 3, False), (90, 7, 2, True), (600, 40, 4, True), (500, 30, 9, False)]
)
def test_the_loop_follows_the_plain_one(N, K, D, weighted, recipe, way):
    if way == "triton" and K > 10 and DEVICE == "cpu":
        pytest.skip("slow in the interpreter")
    x = points(N, D)
    w = points(N, 1, seed=2).abs().flatten() if weighted else None
    kw = {"best": BEST, "reference": REFERENCE, "given": {"over_relaxation": 1.5, "move_centroids": False}}[recipe]
    iterations = 3 if way == "triton" and not ALL else 6
    rest = (iterations, kw["over_relaxation"], kw["move_centroids"], 5, w)
    first = None if recipe == "best" else x[:K].clone()
    found = lloyd_torch.lloyd(x, K, first, *rest, None)
    cpu = None if first is None else first.cpu()
    expected = kd_lloyd.lloyd(x.cpu(), K, cpu, *rest[:-1], None if w is None else w.cpu())
    # The same but for rounding, which may put a point on a border to the other side and, with moves, go its own way.
    assert found.inertia[0] == pytest.approx(expected.inertia[0], rel=1e-6)
    assert found.inertia == pytest.approx(expected.inertia, rel=1e-2 if recipe == "best" else 1e-4)
    np.testing.assert_array_equal(found.codes_N.cpu(), assign_reference(x, found.centroids_KD)[0].cpu())
    error = (x.double() - found.centroids_KD.double()[found.codes_N.long()]).square().sum(1)
    assert found.inertia[-1] == pytest.approx(float((error if w is None else error * w).sum()), rel=1e-6)
    assert found.inertia[-1] == min(found.inertia) and len(found.inertia) == iterations + 1


def test_the_loop_takes_the_boxes_and_stays_exact(way, monkeypatch):
    monkeypatch.setattr(lloyd_torch, "NEAR_K", {2: 20})
    x = points(90, 2).bfloat16()
    seen = []
    found = lloyd_torch.lloyd(x, 20, x[:20].float(), 3, 1.9, True, 0, None, lambda *told: seen.append(told))
    assert seen == list(enumerate(found.inertia))
    expected = kd_lloyd.lloyd(x.cpu(), 20, x[:20].float().cpu(), 3, 1.9, True, 0, None)
    assert found.inertia == pytest.approx(expected.inertia, rel=1e-3)
    np.testing.assert_array_equal(found.codes_N.cpu(), assign_reference(x, found.centroids_KD)[0].cpu())


@pytest.mark.parametrize("recipe", [BEST, REFERENCE], ids=["best", "reference"])
def test_fewer_distinct_points_than_centroids_leave_no_error(recipe, way):
    x = points(7, 2).repeat(9, 1)
    rest = (6, recipe["over_relaxation"], recipe["move_centroids"], 0, None, None)
    first = None if recipe is BEST else x[:12].clone()  # some are equal: their clusters are empty
    found = lloyd_torch.lloyd(x, 12, first, *rest)
    assert found.inertia[-1] < 1e-8 * float(x.square().sum())
    assert torch.isfinite(found.centroids_KD).all()


def test_empty_clusters_are_filled(way):
    x = points(100, 2)
    first = torch.cat([x[:3], torch.full((5, 2), 1e6, device=DEVICE)])
    for moves in (False, True):
        found = lloyd_torch.lloyd(x, 8, first, 8, 1.0, moves, 0, None, None)
        assert len(found.codes_N.unique()) == 8
        assert found.inertia[-1] < 0.5 * found.inertia[0]


# ---- codebook layers ----


@pytest.mark.parametrize("shape,dtype", each(LAYERS, [torch.float32, torch.bfloat16]))
def test_decode_is_indexing(shape, dtype):
    I, O, K, D = shape
    codes, centroids, bits, packed = layer(I, O, K, D)
    expected = centroids.to(dtype)[codes].view(I, -1)[:, :O]
    found = codebook_triton.decode(packed.to(DEVICE), bits, centroids.to(DEVICE, dtype), I, O)
    assert found.dtype == dtype and torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(
    "B,dtype",
    [(1, torch.float32), (16, torch.float16), (7, torch.bfloat16)],
)
@pytest.mark.parametrize("I,O,K,D", [*LAYERS, (300, 66, 17, 5)])
def test_multiply_is_the_matrix_product(I, O, K, D, B, dtype):
    if B > 1 and I * O > 1000 and DEVICE == "cpu":
        pytest.skip("slow in the interpreter")
    codes, centroids, bits, packed = layer(I, O, K, D)
    x = torch.randn(B, I, generator=torch.Generator().manual_seed(B)).to(dtype)
    weight = centroids.to(dtype)[codes].view(I, -1)[:, :O]
    found = codebook_triton.multiply(x.to(DEVICE), packed.to(DEVICE), bits, centroids.to(DEVICE, dtype), O)
    torch.testing.assert_close(found.cpu(), (x.double() @ weight.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def few_copies(monkeypatch):
    """Of small sums, in the interpreter; what more of them do is shown below."""
    if not ALL:
        monkeypatch.setattr(codebook_triton, "MOST_COPIES", 3)


@pytest.mark.parametrize(
    "shape,dtype", each([*LAYERS, (300, 64, 5, 4), (4, 64, 33000, 4)], [torch.float32, torch.bfloat16])
)
def test_gradient_is_the_sum_over_all_places(shape, dtype, few_copies):
    I, O, K, D = shape
    if K > 50_000 and DEVICE == "cpu":
        pytest.skip("slow in the interpreter")
    codes, _, bits, packed = layer(I, O, K, D)
    grad = torch.randn(I, O, generator=torch.Generator().manual_seed(I)).to(dtype)
    padded = torch.nn.functional.pad(grad.double(), (0, codes.shape[1] * D - O)).reshape(-1, D)
    expected = torch.zeros(K, D, dtype=torch.float64).index_add_(0, codes.flatten(), padded)
    as_backward_hands_it_over = grad.T.contiguous().T  # the weight being a transpose
    for given in (grad, as_backward_hands_it_over) if K < 10_000 else (as_backward_hands_it_over,):
        found = codebook_triton.gradient(given.to(DEVICE), packed.to(DEVICE), bits, K, D)
        torch.testing.assert_close(found.cpu(), expected.float(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("most", [1, 3, 64])
def test_gradients_summed_in_copies_are_the_same_bits(most, monkeypatch):
    codes, _, bits, packed = layer(100, 130, 20, 4)
    grad = torch.randn(100, 130, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = codebook_triton.gradient(grad, packed.to(DEVICE), bits, 20, 4)
    monkeypatch.setattr(codebook_triton, "MOST_COPIES", most)
    assert torch.equal(codebook_triton.gradient(grad, packed.to(DEVICE), bits, 20, 4), expected)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gradients_of_any_size_are_added_exactly(size):
    codes, _, bits, packed = layer(40, 30, 6, 3)
    grad = (grid(40, 30, 1000) * size).to(DEVICE)
    found = codebook_triton.gradient(grad, packed.to(DEVICE), bits, 6, 3)
    expected = torch.zeros(6, 3, dtype=torch.float64).index_add_(0, codes.flatten(), grad.cpu().double().view(-1, 3))
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=1e-6, atol=1e-12 * size)


def test_a_gradient_that_is_zero_or_not_finite_stays_so():
    packed, bits = layer(8, 6, 5, 3)[3].to(DEVICE), 3
    grad = torch.zeros(8, 6, device=DEVICE)
    assert not codebook_triton.gradient(grad, packed, bits, 5, 3).any()
    for bad in (float("nan"), float("inf")):
        grad[3, 2] = bad
        assert codebook_triton.gradient(grad, packed, bits, 5, 3).isnan().all()


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_compressed_layer_is_that_of_plain_torch(axis, dtype, monkeypatch, few_copies):
    g = torch.Generator().manual_seed(0)
    codes, books = torch.randint(0, 300, (2, 12 * 40), generator=g), torch.randn(2, 300, 4, generator=g) / 8
    results = []
    for by_triton in (False, True):
        monkeypatch.setattr(codebook, "native", None)
        for module in (codebook, form):
            monkeypatch.setattr(module, "runs_triton", lambda _, by_triton=by_triton: by_triton)
        stored = form.CodebookWeight.from_codes(codes, books, out_features=48, in_features=40, axis=axis)
        one = CompressedLinear(stored.float(), None, dtype).to(DEVICE)
        x = torch.randn(20, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        y = one(x)
        y.float().square().sum().backward()
        with torch.no_grad():
            few = one(x[:3])
            short = by_triton or DEVICE == "cpu"
            assert (stored.product(x[:3]) is not None) == (axis == "out" and short)
        assert few.dtype == dtype
        results.append([t.float().cpu() for t in (y, few, one.stored.codebooks.grad)])
    for plain, found in zip(*results):
        torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-4)


# ---- the compiler, and a GPU ----

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cluscomp.kernels import codebook_triton, lloyd_triton

TYPES = dict(
    points="*fp32", weights="*fp32", centroids="*fp32", distances="*fp32", scale="fp32", rows_KS="*fp16", sure="*i8",
    tile_N="*i32", codes="*i32", present="*i32", begin="*i64", moments="*fp64", packed="*u8", codebook="*bf16",
    keys="*i64", out="*bf16", x="*bf16", parts="*fp32", grad="*bf16", sums="*i64", leaf_low="*fp32", leaf_high="*fp32",
    group_low="*fp32", group_high="*fp32", row_n="*i64", largest="*bf16",
)
SIZES = dict(
    D=2, S=16, WIDTH=2, LEAF=16, WEIGHTED=True, BATCH=16, ROWS=32, COLUMNS=64, GROUPS=8, BLOCK=32, TILE=64, BITS=11,
    WHOLE=False, FULL=False,
)
INNER = ("_squares", "_gap", "_any_near", "_codes", "_real", "_scale")  # called by the others
for module in (lloyd_triton, codebook_triton):
    kernels = {name: kernel for name, kernel in vars(module).items() if isinstance(kernel, triton.JITFunction)}
    for name, kernel in kernels.items():
        if name in INNER:
            continue
        sizes = {n: SIZES[n] for n in kernel.arg_names if n in SIZES}
        types = TYPES | ({"out": "*fp32"} if name in ("_rows", "_of_sums") else {})
        signature = {n: "constexpr" if n in sizes else types.get(n, "i32") for n in kernel.arg_names}
        constants = {(kernel.arg_names.index(n),): value for n, value in sizes.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
        print(name)
"""


def test_all_kernels_compile_for_a_gpu_without_one(tmp_path):
    """As Triton's interpreter accepts more than its compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    (tmp_path / "compile.py").write_text(COMPILE)
    command = [sys.executable, str(tmp_path / "compile.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == 10


@on_a_gpu
@pytest.mark.parametrize("recipe", [BEST, REFERENCE], ids=["best", "reference"])
@pytest.mark.parametrize("N,K,D", [(60_000, 1500, 4), (50_000, 300, 9), (40_000, 16, 1)])
def test_a_gpu_clusters_as_the_cpu_does(N, K, D, recipe):
    x = points(N, D)
    found, again = (kmeans(x, K, Recipe(**recipe), torch.Generator().manual_seed(0)) for _ in range(2))
    assert found.centroids_KD.is_cuda and found.codes_N.is_cuda
    assert torch.equal(found.centroids_KD, again.centroids_KD) and torch.equal(found.codes_N, again.codes_N)
    assert torch.equal(found.codes_N, lloyd_torch.assign(x, found.centroids_KD)[0])
    expected = kmeans(x.cpu(), K, Recipe(**recipe), torch.Generator().manual_seed(0))
    assert found.inertia[-1] == pytest.approx(expected.inertia[-1], rel=5e-3)


@on_a_gpu
def test_bad_points_on_a_gpu_are_refused_in_a_sentence():
    x = points(50, 3)
    x[31, 2] = float("nan")
    with pytest.raises(ValueError, match=r"\[31, 2\]"):
        lloyd(x, 5)
    with pytest.raises(ValueError, match="must agree"):
        assign(points(9, 3), points(4, 3).cpu())
