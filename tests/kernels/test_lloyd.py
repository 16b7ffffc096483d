"""The K-means kernels against brute force, against their plain references, and against nonsense."""

import hashlib
import os
import signal
import threading
import time
from itertools import combinations

import numpy as np
import pytest
import torch
from forks import until
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import kd_lloyd

from cluscomp.kernels import lloyd as kmeans
from cluscomp.kernels.lloyd import BEST, REFERENCE, assign, lloyd, spatial_order
from cluscomp.kernels.lloyd_torch import assign_reference
from cluscomp.kernels.loading import native

compiled = pytest.mark.skipif(native is None, reason="needs the compiled kernels")
SHAPES = [
    (1, 1, 1),
    (2, 2, 1),
    (17, 16, 2),
    (3000, 1, 4),
    (3000, 17, 3),
    (3000, 256, 4),
    (4000, 700, 6),
    (3000, 300, 9),
    (2000, 65, 16),
    (1500, 40, 23),
]


def points(N: int, D: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed points: normal with a log-normal size each."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g) * torch.exp(0.7 * torch.randn(N, 1, generator=g))


def exact(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """All squared distances in float64: the independent truth."""
    return (points_ND.double()[:, None] - centroids_KD.double()).square().sum(2)


def searches() -> list[tuple[str, str]]:
    if native is None:
        return []
    sets = []
    for isa in ("avx512", "avx2", "base"):
        try:
            run_assign(points(2, 2), points(2, 2), "brute", isa)
        except ValueError:
            continue
        sets += [(search, isa) for search in ("brute", "boxes")]
    return sets


def run_assign(points_ND: torch.Tensor, centroids_KD: torch.Tensor, search: str, isa: str, threads: int = 1):
    codes_N, distances_N = torch.empty(len(points_ND), dtype=torch.int32), torch.empty(len(points_ND))
    native.assign(points_ND, centroids_KD, codes_N, distances_N, threads, search, isa)
    return codes_N, distances_N


def run_lloyd(points_ND: torch.Tensor, K: int, search: str, isa: str, threads: int = 1, iterations: int = 8):
    centroids_KD, codes_N = torch.empty(K, points_ND.shape[1]), torch.empty(len(points_ND), dtype=torch.int32)
    nothing = torch.empty(0, points_ND.shape[1])
    inertia = native.lloyd(
        points_ND, nothing, None, centroids_KD, codes_N, iterations, True, True, 1.9, 0, threads, search, isa, None
    )
    return kmeans.Clustering(centroids_KD, codes_N, inertia)


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("N,K,D", SHAPES)
def test_every_search_finds_the_nearest_centroid_of_every_point(N, K, D):
    x, c = points(N, D), points(K, D, seed=1)
    truth = exact(x, c)
    least = truth.min(1).values
    for codes, distances in [assign_reference(x, c), assign(x, c)] + [run_assign(x, c, *how) for how in searches()]:
        chosen = truth.gather(1, codes.long()[:, None])[:, 0]
        assert (chosen <= least * (1 + 1e-5)).all()
        assert torch.allclose(distances.double(), least, rtol=1e-5, atol=0)


@compiled
@pytest.mark.parametrize("N,K,D", SHAPES)
def test_searches_agree_to_the_last_bit(N, K, D):
    x = points(N, D)
    for isa in {isa for _, isa in searches()}:
        c = points(K, D, seed=1)
        assert len({digest(*run_assign(x, c, search, isa)) for search in ("brute", "boxes")}) == 1
        found = {search: run_lloyd(x, K, search, isa) for search in ("brute", "boxes", "lists")}
        assert len({digest(f.centroids_KD, f.codes_N) for f in found.values()}) == 1
        one = found["lists"]
        assert torch.equal(one.codes_N, run_assign(x, one.centroids_KD, "brute", isa)[0])


@pytest.mark.parametrize("D", [1, 2, 4, 7, 17])
def test_the_lowest_number_wins_a_tie(D):
    g = torch.Generator().manual_seed(D)
    x = torch.randint(0, 3, (2000, D), generator=g).float()
    c = torch.randint(0, 3, (300, D), generator=g).float()  # integers: distances are exact, many centroids are equal
    expected = exact(x, c).min(1).indices.int()
    expected_first = (exact(x, c) == exact(x, c).min(1, keepdim=True).values).int().argmax(1).int()
    assert torch.equal(expected, expected_first)
    assert torch.equal(assign(x, c)[0], expected)
    for how in searches():
        assert torch.equal(run_assign(x, c, *how)[0], expected)
    for settings_ in (REFERENCE, BEST):
        found = lloyd(x, 50, **settings_)
        assert torch.equal(found.codes_N, assign(x, found.centroids_KD)[0])


@compiled
@pytest.mark.parametrize("K,D", [(700, 6), (700, 4), (300, 12)])
def test_a_known_order_changes_no_bit(K, D):
    x, c, bend = points(900, D), points(K, D, seed=1), torch.eye(D) + 0.3 * points(D, D, seed=2)
    order_K = spatial_order(c)
    assert torch.equal(order_K.sort().values, torch.arange(K, dtype=torch.int32))
    for bent_KD in (c, c @ bend):
        for known_K in (order_K, order_K.flip(0)):
            assert all(torch.equal(*pair) for pair in zip(assign(x, bent_KD), assign(x, bent_KD, order_K=known_K)))
    for wrong_K in (order_K[1:], order_K.clamp(min=1), order_K - 1, order_K.clone().fill_(K)):
        with pytest.raises(ValueError, match=r"sizes differ|every centroid once"):
            assign(x, c, order_K=wrong_K)


@pytest.mark.parametrize("settings_", [REFERENCE, BEST], ids=["reference", "best"])
@pytest.mark.parametrize("K,D", [(300, 4), (100, 9), (40, 16), (20, 1)])
def test_threads_do_not_change_a_bit(K, D, settings_):
    x, w = points(20_000, D), points(20_000, 1).abs().flatten()
    for weights in (None, w):
        runs = [lloyd(x, K, **settings_, threads=t, weights_N=weights) for t in (1, 2, 2, 5)]
        assert len({digest(r.centroids_KD, r.codes_N) for r in runs}) == 1
        assert len({tuple(r.inertia) for r in runs}) == 1


def test_threads_do_not_change_a_bit_where_all_work_on_one_piece():
    x = points(600_000, 3)
    runs = [lloyd(x, 999, init="kd", iterations=2, move_centroids=True, threads=t) for t in (1, 3)]
    assert len({digest(r.centroids_KD, r.codes_N) for r in runs}) == 1


@pytest.mark.parametrize("K", [4097, 8200])  # as one thread, all threads put so many centroids into spatial order
def test_threads_do_not_change_a_bit_with_many_centroids(K):
    x = points(20_000, 3)
    runs = [lloyd(x, K, **{**BEST, "iterations": 2}, threads=t) for t in (1, 3)]
    assert len({digest(r.centroids_KD, r.codes_N) for r in runs}) == 1


@pytest.mark.parametrize("settings_", [REFERENCE, BEST], ids=["reference", "best"])
def test_lloyd_reports_the_inertia_of_what_it_returns(settings_):
    x = points(5000, 5)
    found = lloyd(x, 80, **settings_)
    error = (x.double() - found.centroids_KD.double()[found.codes_N.long()]).square().sum()
    assert found.inertia[-1] == pytest.approx(float(error), rel=1e-6)
    assert found.inertia[-1] == min(found.inertia)
    assert len(found.inertia) == 21
    assert torch.equal(found.codes_N, assign(x, found.centroids_KD)[0])


def test_plain_rounds_never_raise_the_inertia_and_end_at_means():
    x = points(4000, 4)
    found = lloyd(x, 30, init="kd", iterations=300)
    assert all(b <= a * (1 + 1e-7) for a, b in zip(found.inertia, found.inertia[1:], strict=False))
    means = torch.stack([x[found.codes_N == k].double().mean(0) for k in range(30)])
    assert torch.allclose(means.float(), found.centroids_KD, atol=1e-5)


@compiled
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("K,D", [(50, 2), (64, 4), (33, 9)])
def test_compiled_lloyd_follows_the_plain_one(K, D, weighted):
    x = points(3000, D)
    w = points(3000, 1, seed=2).abs().flatten() if weighted else None
    first = x[:K].clone()
    ours = lloyd(x, K, init=first, iterations=6, over_relaxation=1.5, weights_N=w)
    plain = kd_lloyd.lloyd(x, K, first, 6, 1.5, False, 0, w)
    assert ours.inertia == pytest.approx(plain.inertia, rel=1e-4)
    kd = lloyd(x, K, init="kd", iterations=0, weights_N=w).centroids_KD
    plain_kd = kd_lloyd.kd(x, K, w)
    assert torch.allclose(*(c[c[:, 0].argsort()] for c in (kd, plain_kd)), atol=1e-4)
    assert lloyd(x, K, **BEST, weights_N=w).inertia[-1] == pytest.approx(
        kd_lloyd.lloyd(x, K, None, 20, 1.9, True, 0, w).inertia[-1], rel=0.02
    )


def test_the_best_recipe_is_near_or_below_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    x = points(6000, 4)
    theirs = cluster.KMeans(64, init="k-means++", n_init=1, max_iter=20, random_state=0).fit(x.numpy()).inertia_
    assert lloyd(x, 64, **BEST).inertia[-1] < 1.03 * theirs


def test_weight_two_is_the_point_twice():
    x = points(500, 3)
    w = torch.randint(1, 4, (500,), generator=torch.Generator().manual_seed(0)).float()
    repeated = x.repeat_interleave(w.long(), dim=0)
    a = lloyd(x, 20, init=x[:20].clone(), iterations=10, weights_N=w)
    b = lloyd(repeated, 20, init=x[:20].clone(), iterations=10)
    assert a.inertia[-1] == pytest.approx(b.inertia[-1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [1, 4])
def test_sixteen_bit_points_are_as_their_float32_values(dtype, D):
    x = torch.cat([points(3000, D), torch.full((1, D), 6e-8), torch.full((1, D), -60000.0)]).to(dtype)
    for settings_ in (REFERENCE, BEST):
        a, b = lloyd(x, 40, **settings_), lloyd(x.float(), 40, **settings_)
        assert digest(a.centroids_KD, a.codes_N) == digest(b.centroids_KD, b.codes_N)
    assert torch.equal(assign(x, x[:9])[1], assign(x.float(), x[:9].float())[1])


@pytest.mark.parametrize("settings_", [REFERENCE, BEST], ids=["reference", "best"])
@pytest.mark.parametrize("D", [1, 4])
def test_fewer_distinct_points_than_centroids_leave_no_error(D, settings_):
    x = points(7, D).repeat(100, 1)
    found = lloyd(x, 20, **settings_)
    assert found.inertia[-1] < 1e-8 * float(x.square().sum())
    assert torch.isfinite(found.centroids_KD).all()
    same = lloyd(torch.ones(300, D), 5, **settings_)
    assert same.inertia[-1] == 0 and torch.equal(same.codes_N, torch.zeros(300, dtype=torch.int32))
    every = lloyd(x[:7], 7, **settings_)
    assert every.inertia[-1] < 1e-12


def test_read_only_and_strided_arrays_serve():
    x = points(1000, 8)
    array = x.numpy().copy()
    array.flags.writeable = False
    expected = digest(*assign(x, x[:30]))
    assert digest(*assign(array, x[:30])) == expected
    assert digest(*assign(x.t().contiguous().t(), x[:30])) == expected
    assert digest(*assign(torch.cat([x, x], dim=1)[:, :8], x[:30].requires_grad_())) == expected


def test_far_outliers_and_tiny_values_stay_exact():
    x = torch.cat([points(2000, 4), 1e6 * points(5, 4), 1e-20 * points(100, 4), 1e14 * points(2, 4)])
    found = lloyd(x, 64, init="kd", iterations=5)
    truth = exact(x, found.centroids_KD)
    chosen = truth.gather(1, found.codes_N.long()[:, None])[:, 0]
    assert (chosen <= truth.min(1).values * (1 + 1e-5) + 1e-35).all()


def test_scalar_clustering_is_optimal():
    rng = np.random.default_rng(0)
    for _ in range(10):
        values = np.sort(rng.choice(1000, 14, replace=False)).astype(np.float64)
        mass = rng.integers(1, 5, 14).astype(np.float64)
        K = int(rng.integers(1, 6))
        x = torch.from_numpy(np.repeat(values, mass.astype(int))).float()[:, None]

        def cost(cuts, values=values, mass=mass):
            edges = [0, *cuts, len(values)]
            parts = [(values[a:b], mass[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
            return sum((m * (v - np.average(v, weights=m)) ** 2).sum() for v, m in parts)

        best = min(cost(c) for c in combinations(range(1, len(values)), K - 1))
        assert lloyd(x, K, init="kd").inertia[-1] == pytest.approx(best, rel=1e-5, abs=1e-6)
        plain = kmeans.best_groups_reference(values, mass, K)
        assert cost(plain[1:]) == pytest.approx(best)


def test_scalar_clustering_of_very_many_values_is_near_the_optimum(monkeypatch):
    x = points(3_000, 1)
    best = lloyd(x, 20, init="kd").inertia[-1]
    monkeypatch.setattr(kmeans, "VALUES_AT_MOST", 500)
    assert best <= lloyd(x, 20, init="kd").inertia[-1] <= 1.02 * best


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda x: lloyd(x, 101), "101 centroids for 100 points"),
        (lambda x: lloyd(x, 0), "at least 1"),
        (lambda x: lloyd(x, 2.5), "whole number"),
        (lambda x: lloyd(x[:0], 1), "at least 1"),
        (lambda x: lloyd(x[:, :0], 1), "at least 1"),
        (lambda x: lloyd(x[0], 1), "two dimensions"),
        (lambda x: lloyd(x.double(), 2), "float64"),
        (lambda x: lloyd([[1.0]], 1), "list"),
        (lambda x: lloyd(x.to("meta"), 2), "CPU"),
        (lambda x: lloyd(torch.zeros(3, 1025), 2), "1024"),
        (lambda x: lloyd(x, 3, iterations=-1), "iterations"),
        (lambda x: lloyd(x, 3, over_relaxation=2.1), "over_relaxation"),
        (lambda x: lloyd(x, 3, over_relaxation=float("nan")), "over_relaxation"),
        (lambda x: lloyd(x, 3, seed=-1), "seed"),
        (lambda x: lloyd(x, 3, threads=0), "threads"),
        (lambda x: lloyd(x, 3, init="best"), "random_points"),
        (lambda x: lloyd(x, 3, init=x[:4]), "init has shape"),
        (lambda x: lloyd(x, 3, init=x[:3] * float("inf")), "init"),
        (lambda x: lloyd(x, 3, weights_N=torch.ones(99)), "weights has shape"),
        (lambda x: lloyd(x, 3, weights_N=torch.zeros(100)), "all weights are zero"),
        (lambda x: lloyd(x, 3, weights_N=torch.full((100,), -1.0)), r"weights\[0\]"),
        (lambda x: lloyd(x, 3, weights_N=torch.full((100,), float("nan"))), r"weights\[0\] is nan"),
        (lambda x: assign(x, x[:3, :2]), "must agree"),
        (lambda x: assign(x, x[:3] / 0), r"centroids\[0, 0\]"),
        (lambda x: assign(torch.empty(1, 1, dtype=torch.bfloat16).expand(2**31, 1), x), "rows"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call(points(100, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2e18])
@pytest.mark.parametrize("init", ["kd", "random_points"])
@pytest.mark.parametrize("D", [1, 3])
def test_a_value_that_is_not_finite_is_named(bad, init, D):
    x = points(50, D)
    x[31, D - 1] = bad
    with pytest.raises(ValueError, match=rf"\[\d+, {D - 1}\]"):
        lloyd(x, 50, init=init)
    with pytest.raises(ValueError, match=rf"\[31, {D - 1}\]"):
        assign(x, points(3, D))


def test_progress_is_told_every_round_and_may_stop_the_work():
    seen = []
    found = lloyd(points(500, 3), 9, iterations=4, progress=lambda i, inertia: seen.append((i, inertia)))
    assert seen == list(enumerate(found.inertia))

    def enough(i, _):
        if i == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        lloyd(points(500, 3), 9, iterations=4, progress=enough)


@compiled
def test_control_c_stops_a_long_assignment(forks, tmp_path):
    code = (
        "import torch; from cluscomp.kernels.lloyd import assign;"
        "points, centroids = torch.randn(1_000_000, 32), torch.randn(20_000, 32); print('go', flush=True);"
        "assign(points, centroids, threads=2)"
    )
    pid = forks.start(tmp_path / "log", script=code)
    until(lambda: (tmp_path / "log").read_text() == "go\n")
    time.sleep(0.5)
    os.kill(pid, signal.SIGINT)
    start = time.monotonic()
    assert forks.wait(pid) == 1
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text() and time.monotonic() - start < 12


@compiled
def test_calls_from_several_threads_do_not_disturb_each_other():
    x = points(20_000, 4)
    expected, found = digest(lloyd(x, 100, **BEST).codes_N), []
    others = [
        threading.Thread(target=lambda: found.append(digest(lloyd(x, 100, **BEST, threads=2).codes_N)))
        for _ in range(3)
    ]
    for t in others:
        t.start()
    for t in others:
        t.join()
    assert found == [expected] * 3


LARGEST = float(np.nextafter(np.float32(1e15), np.float32(0)))
number = st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-45, LARGEST, 2.0**-130])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_points_are_clustered_exactly(data):
    N, D = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 2, 3, 4, 6, 17]))
    few = data.draw(st.lists(number, min_size=1, max_size=6))
    x = torch.tensor(data.draw(st.lists(st.sampled_from(few), min_size=N * D, max_size=N * D))).view(N, D)
    K = data.draw(st.integers(1, N))
    kw = data.draw(st.sampled_from([REFERENCE, BEST]))
    w = data.draw(st.none() | st.lists(st.sampled_from([0.0, 1.0, 1e-30, 7.5]), min_size=N, max_size=N).filter(any))
    found = lloyd(x, K, **kw, weights_N=None if w is None else torch.tensor(w), threads=data.draw(st.integers(1, 3)))
    assert torch.isfinite(found.centroids_KD).all() and found.codes_N.min() >= 0 and found.codes_N.max() < K
    codes, distances = assign(x, found.centroids_KD)
    assert torch.equal(found.codes_N, codes)
    truth = exact(x, found.centroids_KD)
    assert (truth.gather(1, codes.long()[:, None])[:, 0] <= truth.min(1).values * (1 + 1e-5) + 1e-36).all()


anything = (
    st.none() | st.integers(-3, 70) | st.text(max_size=4)
    | st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 9), max_size=3),
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.float64, torch.bool]),
    )
)  # fmt: skip


@compiled
@settings(max_examples=200, deadline=None)
@given(st.lists(anything, min_size=5, max_size=7), st.integers(-2, 3))
def test_no_call_of_the_compiled_code_can_crash(arguments, threads):
    for call in (
        lambda: native.assign(*arguments),
        lambda: native.assign(*arguments[:4], threads),
        lambda: native.assign(*arguments[:4], threads, order=arguments[4]),
        lambda: native.spatial_order(*arguments[:2], threads),
        lambda: native.lloyd(*arguments[:5], 3, threads > 0, True, 1.5, 0, threads, "choose", "", None),
        lambda: native.best_groups([1.0, 2.0], [1.0], threads),
        lambda: native.best_levels(*arguments[:3], threads),
    ):
        try:
            call()
        except (TypeError, ValueError):
            pass


def test_without_the_compiled_kernels_everything_still_works(without_ours):
    code = (
        "import sys; sys.modules['cluscomp.kernels._native'] = None\n"
        "import torch; from cluscomp.kernels import lloyd as k; assert k.native is None\n"
        "x = torch.randn(400, 3)\n"
        "for how in (k.REFERENCE, k.BEST):\n"
        "    found = k.lloyd(x, 20, **how); assert torch.equal(found.codes_N, k.assign(x, found.centroids_KD)[0])\n"
        "print(k.lloyd(x[:, :1], 4).inertia)"
    )
    run = without_ours.run(script=code)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("compiled kernels not available") == 1
