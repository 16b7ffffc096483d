"""Stored weights against a loop over entries, the compressed layer against nn.Linear on the dense weight."""

import math
import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import codebook as reference
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cluscomp.forms import codebook
from cluscomp.forms.codebook import CodebookWeight, sub_vectors
from cluscomp.forms.linear import CompressedLinear, storage_dtype
from cluscomp.train.masters import Trained


def random_weight(out_features=6, in_features=10, axis="out", dim=4, size=5, books=1, seed=0):
    """A weight of random codes, and those codes (M, N) and float16 codebooks (M, K, D)."""
    rng = np.random.default_rng(seed)
    lines, length = (in_features, out_features) if axis == "out" else (out_features, in_features)
    codes = rng.integers(0, size, (books, lines * math.ceil(length / dim)))
    codebooks = rng.standard_normal((books, size, dim)).astype(np.float16)
    weight = CodebookWeight.from_codes(
        torch.from_numpy(codes),
        torch.from_numpy(codebooks),
        out_features=out_features,
        in_features=in_features,
        axis=axis,
    )
    return weight, codes, codebooks


shapes = given(
    out_features=st.integers(6, 12),
    in_features=st.integers(6, 12),
    axis=st.sampled_from(["out", "in"]),
    dim=st.integers(1, 6),
    size=st.integers(2, 40),
    books=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=40, deadline=None)
@shapes
def test_the_dense_weight_is_that_of_a_loop(out_features, in_features, axis, dim, size, books, seed):
    weight, codes, codebooks = random_weight(out_features, in_features, axis, dim, size, books, seed)
    expected = reference.dense(codes, codebooks.astype(np.float64), out_features, in_features, axis)
    assert weight(torch.float32).shape == (out_features, in_features)
    np.testing.assert_allclose(weight(torch.float32).detach().numpy(), expected, rtol=1e-6, atol=1e-6)
    assert weight(torch.bfloat16).dtype == torch.bfloat16
    np.testing.assert_array_equal(weight.unpacked().numpy(), codes)


@settings(max_examples=40, deadline=None)
@shapes
def test_the_ledger_is_what_is_stored(out_features, in_features, axis, dim, size, books, seed):
    weight, _, _ = random_weight(out_features, in_features, axis, dim, size, books, seed)
    ledger = weight.ledger()
    stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in weight.state_dict().values())
    assert sum(ledger.values()) == stored == books * reference.bits(out_features, in_features, axis, dim, size)
    assert 0 <= ledger["padding"] < 8 * 16 * books


@settings(max_examples=30, deadline=None)
@shapes
def test_a_module_made_from_the_spec_takes_the_stored_tensors(
    out_features, in_features, axis, dim, size, books, seed
):  # fmt: skip
    weight, _, _ = random_weight(out_features, in_features, axis, dim, size, books, seed)
    again = CodebookWeight.empty(**weight.spec())
    again.load_state_dict(weight.state_dict())
    assert torch.equal(again(torch.float32), weight(torch.float32))
    assert again.ledger() == weight.ledger()


@pytest.mark.parametrize(
    "axis, expected",
    [
        ("out", [[1, 4], [7, 0], [2, 5], [8, 0], [3, 6], [9, 0]]),
        ("in", [[1, 2], [4, 5], [7, 8], [3, 0], [6, 0], [9, 0]]),
    ],
)
def test_sub_vectors_by_hand(axis, expected):
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert sub_vectors(weight, 2, axis).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["out", "in"]), st.integers(1, 9))
def test_one_centroid_for_each_sub_vector_gives_the_weight_back(out_features, in_features, axis, dim):
    weight = torch.arange(out_features * in_features).view(out_features, in_features).float()
    length = out_features if axis == "out" else in_features
    if dim > length:
        with pytest.raises(ValueError, match=f"vector_dim {dim} .* {length}.* axis '{axis}'"):
            sub_vectors(weight, dim, axis)
        return
    vectors = sub_vectors(weight, dim, axis)
    codebook = torch.cat([vectors, vectors[:1]])[None]  # one more, since a codebook has at least two
    stored = CodebookWeight.from_codes(
        torch.arange(len(vectors))[None], codebook, out_features=out_features, in_features=in_features, axis=axis
    )
    assert torch.equal(stored(torch.float32), weight)


def layers(axis="out", books=1, bias=True, dtype=torch.float32, **shape):
    """A compressed layer with float32 masters that all learn, and the nn.Linear of the same dense weight."""
    weight, _, _ = random_weight(axis=axis, books=books, **shape)
    weight.codebooks.data = weight.codebooks.data.float()
    vector = torch.randn(weight.out_features, generator=torch.Generator().manual_seed(1)) if bias else None
    layer = CompressedLinear(weight, vector, dtype)
    dense = nn.Linear(weight.in_features, weight.out_features, bias=bias)
    dense.weight.data = weight(torch.float32).detach().clone()
    if bias:
        dense.bias.data = vector.clone()
        layer.bias.requires_grad_(True)
    return layer, dense


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10)], ids=str)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("books", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_those_of_the_dense_layer(shape, axis, books, bias):
    layer, dense = layers(axis, books, bias)
    ours = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    upstream = torch.randn(*shape[:-1], 6, generator=torch.Generator().manual_seed(3))
    result, expected = layer(ours), dense(theirs)
    torch.testing.assert_close(result, expected)
    result.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    books_grad = torch.zeros_like(layer.stored.codebooks)
    vectors = sub_vectors(dense.weight.grad, 4, axis)  # each sub-vector's gradient goes to its centroid
    for book, codes in zip(books_grad, layer.stored.unpacked()):
        for vector, code in zip(vectors, codes):
            book[code] += vector
    torch.testing.assert_close(layer.stored.codebooks.grad, books_grad)


@pytest.mark.parametrize("x_shape", [(40,), (3, 40), (2, 3, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_weight_in_tiles_gives_the_dense_layer(x_shape, bias, monkeypatch):
    monkeypatch.setattr(codebook, "TILE", 200)  # 8 inputs of 22 outputs
    weight, _, _ = random_weight(22, 40, "out", dim=4, size=9, books=2)
    weight.to_masters()
    assert len(weight.tiles()) == 5 and random_weight(22, 32)[0].tiles() == [slice(0, 32)]
    g = torch.Generator().manual_seed(0)
    bias_O = torch.randn(22, generator=g) if bias else None
    plain = nn.Linear(40, 22, bias=bias)
    plain.weight.data = weight(torch.float32).detach()
    if bias:
        plain.bias.data = bias_O.clone()
    layer = CompressedLinear(weight, bias_O, torch.float32)
    x = torch.randn(*x_shape, generator=g)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = torch.randn(*x_shape[:-1], 22, generator=g)
    found, expected = layer(ours), plain(theirs)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    (codebooks_grad,) = torch.autograd.grad(weight(torch.float32), weight.codebooks, plain.weight.grad)
    torch.testing.assert_close(weight.codebooks.grad, codebooks_grad)


def test_gradients_reach_float32_masters_from_a_16_bit_model():
    layer, _ = layers(dtype=torch.bfloat16)
    layer.bias = None
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    layer(x.bfloat16()).float().square().sum().backward()
    assert layer.stored.codebooks.grad.dtype == torch.float32
    twin, _ = layers()
    twin.bias = None
    twin(x).square().sum().backward()
    exact = twin.stored.codebooks.grad
    assert (layer.stored.codebooks.grad - exact).norm() < 0.03 * exact.norm()


def test_nothing_frozen_gets_a_gradient():
    layer, _ = layers()
    layer.requires_grad_(False)
    x = torch.ones(2, 10, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.stored.codebooks.grad is None and layer.bias.grad is None


def saved_sizes(module, x):
    """Bytes of each distinct tensor that autograd keeps between forward and backward."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        module(x)
    return [t.numel() * t.element_size() for t in kept.values()]


def test_autograd_never_keeps_a_dense_weight():
    shape = {"out_features": 256, "in_features": 256, "size": 16}
    pairs = [layers(seed=seed, **shape) for seed in range(4)]
    x = torch.ones(2, 256, requires_grad=True)
    dense_bytes = 256 * 256 * 4
    assert max(saved_sizes(nn.Sequential(*[dense for _, dense in pairs]), x)) == dense_bytes  # the hooks do see one
    kept = saved_sizes(nn.Sequential(*[layer for layer, _ in pairs]), x)
    assert sum(kept) == 4 * (2 * 256 + 16 * 4) * 4  # inputs and codebooks, nothing else


def test_a_centroid_too_large_for_16_bit_is_refused():
    with pytest.raises(ValueError, match=r"7e\+04 does not fit a 16-bit float"):
        CodebookWeight.from_codes(
            torch.zeros(1, 4, dtype=torch.long),
            torch.tensor([[[7e4], [1.0]]]),
            out_features=2,
            in_features=2,
            axis="out",
        )


@pytest.mark.parametrize("size, ok", [(5, False), (8, True)])
def test_check_finds_a_code_past_the_codebook(size, ok):
    weight, _, _ = random_weight(size=size)
    weight.check()
    weight.codes.fill_(255)  # every code is 7
    if ok:
        weight.check()
    else:
        with pytest.raises(ValueError, match="code 7 exceeds the codebook of 5 centroids"):
            weight.check()


@pytest.mark.parametrize(
    "value, dtype",
    [
        (1.0, torch.bfloat16),
        (1e30, torch.float32),
        (2.0**100, torch.bfloat16),  # too large for float16
        (1 + 2**-10, torch.float16),  # too fine for bfloat16
        (1 + 2**-20, torch.float32),
        (math.inf, torch.bfloat16),
    ],
)
def test_the_narrowest_exact_type_by_hand(value, dtype):
    tensor = torch.tensor([0.0, value, -1.5])
    assert storage_dtype(tensor) == dtype
    assert torch.equal(tensor.to(storage_dtype(tensor)).float(), tensor)


def test_the_storage_type_of_what_is_not_a_float_is_its_own():
    assert storage_dtype(torch.tensor([1, 2])) == torch.int64
    assert storage_dtype(torch.tensor([1.5], dtype=torch.bfloat16)) == torch.bfloat16
    assert storage_dtype(torch.tensor([2.0**100], dtype=torch.bfloat16)) == torch.bfloat16
    assert storage_dtype(torch.tensor([math.nan])) == torch.float32


@pytest.mark.parametrize("axis, codebook_size", [("out", 5), ("out", 200), ("in", 200), ("in", 5)])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_few_tokens_take_a_short_cut_to_the_same_product(axis, codebook_size, tokens):
    """Without gradients products of few tokens are made straight from the codes; with them from the dense weight."""
    generator = torch.Generator().manual_seed(tokens)
    vectors = 40 * 16 if axis == "out" else 14 * 48  # ceil(48 / 3) a line, ceil(40 / 3) groups
    codes = torch.randint(0, codebook_size, (2, vectors), generator=generator)
    books = torch.randn(2, codebook_size, 3, generator=generator)
    stored = CodebookWeight.from_codes(codes, books, out_features=48, in_features=40, axis=axis)
    layer = CompressedLinear(stored, torch.randn(48, generator=generator), torch.float32)
    x = torch.randn(tokens, 40, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[None])[0], layer(x))
        expected = torch.nn.functional.linear(x, stored(torch.float32), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), expected)
    short = (stored.product(x) is not None, (tokens <= 8 and axis == "out") or (tokens == 1 and codebook_size == 200))
    assert short[0] == short[1]
    for dtype in (torch.bfloat16, torch.float16):  # of exact centroids, summed in float32 and then rounded
        narrow = stored.product(x.to(dtype))
        assert (narrow is not None) == short[0]
        if narrow is not None:
            assert narrow.dtype == dtype and torch.equal(narrow, stored.product(x.to(dtype).float()).to(dtype))
    assert stored.product(x.double()) is None


# weights that share codebooks


def sharing(seed=0):
    """Two weights of one codebook with scales of their own, and a third that shares nothing."""
    rng, weights = np.random.default_rng(seed), []
    centroids = torch.from_numpy(rng.standard_normal((1, 5, 3)).astype(np.float32))
    for outputs, scale in ((6, 0.5), (9, 1.7)):
        codes = torch.from_numpy(rng.integers(0, 5, (1, 4 * outputs // 3)))
        sizes = {"out_features": outputs, "in_features": 4, "axis": "out"}
        weights.append(CodebookWeight.from_codes(codes, centroids, torch.tensor([scale]), **sizes))
    weights[1].follow(weights[0])
    return weights


def test_a_shared_codebook_is_scaled_for_each_weight_and_counted_once():
    first, second = sharing()
    for weight, scale in ((first, 0.5), (second, 1.7)):
        entries = first.codebooks[0].float()[weight.unpacked()[0].long()].view(4, -1).T
        torch.testing.assert_close(weight(torch.float32), scale * entries)
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(weight.product(x), x @ weight(torch.float32).T)
    assert first.ledger() == {"codes": 8 * 3, "codebooks": 15 * 16, "padding": 0, "scales": 32}
    assert second.ledger() == {"codes": 12 * 3, "codebooks": 0, "padding": 12, "scales": 32}
    assert first.paper_bits() == 8 * 16 + 15 * 16 + 32 and second.paper_bits() == 12 * 16 + 32


def test_the_gradient_of_a_shared_codebook_is_the_sum_of_both():
    weights = sharing()
    for weight in weights:
        weight.to_masters()
    dense = [weight(torch.float32) for weight in weights]
    alone = [torch.autograd.grad(one.square().sum(), weights[0].codebooks, retain_graph=True)[0] for one in dense]
    sum(one.square().sum() for one in dense).backward()
    torch.testing.assert_close(weights[1].codebooks.grad, alone[0] + alone[1])


def test_shared_codebooks_are_trained_settled_and_restored_as_one():
    weights = sharing()
    model = nn.ModuleList([CompressedLinear(weight, None, torch.float32) for weight in weights])
    before = [weight(torch.float32).detach().clone() for weight in weights]
    trained = Trained(model, codebooks=True, others={})
    assert len(trained.parameters) == 1
    trained.start()
    assert trained.parameters[0].dtype == torch.float32
    for weight, dense in zip(weights, before):
        assert torch.equal(weight(torch.float32), dense)
    trained.parameters[0].data += 0.25
    moved = trained.parameters[0].data.half()
    assert trained.finish() is None
    size = sum(float(dense.square().sum()) for dense in [weight.codebooks.float() - 0.25 for weight in weights])
    assert trained.moved() == pytest.approx(0.0625 * 2 * moved.numel() / size, rel=1e-2)
    for weight, scale in zip(weights, (0.5, 1.7)):
        assert weight.codebooks is trained.parameters[0] and torch.equal(weight.codebooks, moved)
        assert weight.scales.item() == pytest.approx(scale)
    trained.restore()
    for weight, dense in zip(weights, before):
        assert weight.codebooks.dtype == torch.float16 and torch.equal(weight(torch.float32), dense)


def test_codebooks_of_another_shape_or_of_8_bits_are_not_shared():
    first, _, _ = random_weight(size=5)
    other, _, _ = random_weight(size=6)
    with pytest.raises(ValueError, match=r"\(1, 6, 4, 'float16'\) cannot be those of another weight, \(1, 5, 4"):
        other.follow(first)
    small = CodebookWeight.empty(
        out_features=6, in_features=4, axis="out", vector_dim=3, codebook_size=5, codebooks=1, storage="int8"
    )
    with pytest.raises(ValueError, match="cannot be those"):
        small.follow(small)


def test_what_a_product_holds_of_its_layer_is_never_out_of_date():
    weight = CodebookWeight.empty(
        out_features=12, in_features=8, axis="out", vector_dim=4, codebook_size=4, codebooks=1, storage="float16"
    )
    weight.codes.zero_()
    weight.codebooks.data.fill_(1)
    x_BI = torch.ones(1, 8)

    def product() -> float:
        found_BO = weight.product(x_BI)
        assert torch.equal(found_BO, x_BI @ weight(torch.float32).T)
        return float(found_BO[0, 0])

    assert product() == 8
    copy = deepcopy(weight)
    weight.codebooks.data.fill_(2)  # in place
    assert product() == 16
    weight.codebooks.data = torch.full_like(weight.codebooks, 3)  # other memory
    assert product() == 24
    weight.codebooks.data = weight.codebooks.data.bfloat16()  # of which a table is made for each call
    assert product() == 24
    weight.codebooks.data.fill_(4)
    assert product() == 32
    weight.codes = weight.codes.clone()
    weight.to_masters()
    assert product() == 32
    assert float(copy.product(x_BI)[0, 0]) == 8
    assert float(pickle.loads(pickle.dumps(weight)).product(x_BI)[0, 0]) == 32


@pytest.mark.parametrize("storage", ["int8", "float8"])
def test_scales_of_8_bits_are_not_rounded_to_the_dtype_first(storage):
    weight = CodebookWeight.from_codes(
        torch.zeros(1, 64, dtype=torch.int32), torch.full((1, 2, 2), 0.1234567),
        out_features=16, in_features=8, axis="out", storage=storage,
    )  # fmt: skip
    expected = weight(torch.float32).detach()
    assert torch.equal(weight(torch.bfloat16).detach(), expected.bfloat16())
