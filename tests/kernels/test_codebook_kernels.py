"""The codebook layer's inner loops against their plain torch versions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp.kernels import codebook
from cluscomp.kernels.codes import pack
from cluscomp.kernels.loading import native

LAYERS = [
    (1, 1, 1, 1),
    (5, 7, 3, 4),
    (64, 96, 16, 4),
    (33, 130, 200, 3),
    (48, 70, 256, 6),
    (17, 1030, 300, 9),
    (70, 64, 4096, 2),
    (40, 256, 65536, 4),
    (9, 50, 31, 20),
    (50, 72, 300, 8),
    (64, 65536, 65500, 4),  # its codes are used where they lie
]


def layer(I: int, O: int, K: int, D: int, axis: str = "out"):
    g = torch.Generator().manual_seed(I * O + K)
    centroids_KD = torch.randn(K, D, generator=g)
    shape = (I, -(-O // D)) if axis == "out" else (-(-I // D), O)
    codes = torch.randint(0, K, shape, generator=g)
    bits = 8 if axis == "in" else max(1, (K - 1).bit_length())
    return codes, centroids_KD, bits, pack(codes.flatten(), bits)


@pytest.mark.parametrize("I,O,K,D", LAYERS)
def test_decode_is_indexing(I, O, K, D):
    codes, centroids_KD, bits, packed = layer(I, O, K, D)
    expected = centroids_KD[codes].view(I, -1)[:, :O]
    for threads in (1, 3):
        assert torch.equal(codebook.decode(packed, bits, centroids_KD, I, O, threads=threads), expected)
    assert torch.equal(codebook.decode(packed, bits, centroids_KD.half(), I, O), expected.half().float())


@pytest.mark.parametrize("I,O,K,D", LAYERS)
@pytest.mark.parametrize("B", [1, 3, 8])
def test_multiply_is_the_matrix_product(I, O, K, D, B):
    codes, centroids_KD, bits, packed = layer(I, O, K, D)
    x_BI = torch.randn(B, I, generator=torch.Generator().manual_seed(B))
    expected = (x_BI.double() @ centroids_KD.double()[codes].view(I, -1)[:, :O]).float()
    one, two = (codebook.multiply(x_BI, packed, bits, centroids_KD, O, threads=t) for t in (1, 3))
    assert torch.allclose(one, expected, rtol=1e-4, atol=1e-4) and torch.equal(one, two)
    half_KD = centroids_KD.half()
    assert torch.allclose(
        codebook.multiply(x_BI, packed, bits, half_KD, O),
        codebook.multiply_reference(x_BI, packed, bits, half_KD, O),
        rtol=1e-4,
        atol=1e-4,
    )
    as_halves, as_floats = (codebook.multiply(x_BI, packed, bits, table, O) for table in (half_KD, half_KD.float()))
    assert native is None or torch.equal(as_halves, as_floats)


@pytest.mark.parametrize(
    "I,O,K,D", [(1, 1, 1, 1), (5, 7, 3, 4), (64, 96, 16, 4), (33, 130, 200, 3), (600, 2300, 256, 4), (1032, 64, 256, 2)]
)
def test_tables_give_the_matrix_product(I, O, K, D):
    codes, centroids_KD, _, packed = layer(I, O, K, D, axis="in")
    x_I = torch.randn(I, generator=torch.Generator().manual_seed(I))
    weight_OI = centroids_KD.double()[codes].permute(1, 0, 2).reshape(O, -1)[:, :I]
    expected = weight_OI @ x_I.double()
    size = float(expected.square().mean().sqrt())
    found = [codebook.multiply_by_tables(x_I, packed, centroids_KD, O, threads=t) for t in (1, 2)]
    assert float((found[0] - expected).square().mean().sqrt()) < 1e-6 * size
    assert torch.equal(*found)


@pytest.mark.parametrize("I,O,K,D", LAYERS + [(300, 64, 5, 4)])
def test_gradient_is_the_sum_over_all_places(I, O, K, D):
    codes, _, bits, packed = layer(I, O, K, D)
    grad_IO = torch.randn(I, O, generator=torch.Generator().manual_seed(I))
    c = torch.zeros(K, D, dtype=torch.float64, requires_grad=True)
    (c[codes].view(I, -1)[:, :O] * grad_IO.double()).sum().backward()
    one, two = (codebook.gradient(grad_IO, packed, bits, K, D, threads=t) for t in (1, 3))
    assert torch.allclose(one, c.grad.float(), rtol=1e-4, atol=1e-4) and torch.equal(one, two)
    assert torch.allclose(codebook.gradient_reference(grad_IO, packed, bits, K, D), one, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512vbmi"])
def test_every_instruction_set_agrees(isa):
    for (I, O, K, D), B in itertools.product(LAYERS, (1, 2, 15)):  # 15: eight rows, four, two and one
        codes, centroids_KD, bits, packed = layer(I, O, K, D)
        half_KD = centroids_KD.half()
        x_BI, y_BO, grad_KD = torch.randn(B, I), torch.empty(B, O), torch.empty(K, D)
        try:
            native.multiply(packed, bits, half_KD.float(), x_BI, y_BO, 1, isa)
        except ValueError as error:
            pytest.skip(str(error))
        assert torch.allclose(y_BO, codebook.multiply_reference(x_BI, packed, bits, half_KD, O), rtol=1e-4, atol=1e-4)
        if isa != "base" and native.takes_halves(D):
            again_BO = torch.empty(B, O)
            native.multiply(packed, bits, half_KD, x_BI, again_BO, 1, isa)
            assert torch.equal(again_BO, y_BO)
        grad_IO = torch.randn(I, O)
        native.gradient(packed, bits, grad_IO, grad_KD, 1, isa)
        assert torch.allclose(grad_KD, codebook.gradient_reference(grad_IO, packed, bits, K, D), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_read_exactly_and_rounded_as_torch_does(isa, dtype):
    bits_N = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    every_N = bits_N.view(dtype)  # infinite ones, those that are no numbers and the smallest, too
    one_KD, packed = torch.ones(2, 1), pack(torch.zeros(1, dtype=torch.int64), 1)
    between_N = torch.cat([every_N.float() * factor for factor in (1, 1 + 2**-12, 1 - 2**-12, 1 + 2**-8, 1 - 2**-9)])
    for x_N, result in ((every_N, torch.float32), (between_N, dtype)):
        y_N = torch.empty(len(x_N), dtype=result)
        x, y = ((a.view(torch.uint16) if a.dtype == torch.bfloat16 else a).numpy()[:, None] for a in (x_N, y_N))
        try:
            native.multiply(packed, 1, one_KD, x, y, 1, isa)
        except ValueError as error:
            pytest.skip(str(error))
        torch.testing.assert_close(y_N, x_N.to(result), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: codebook.decode(torch.zeros(8, dtype=torch.uint8), 8, torch.zeros(4, 4), 30, 4), "30 codes"),
        (
            lambda: codebook.multiply_by_tables(
                torch.zeros(4), torch.zeros(8, dtype=torch.uint8), torch.zeros(300, 4), 1
            ),
            "up to 256",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.skipif(native is None, reason="needs the compiled kernels")
@settings(max_examples=200, deadline=None)
@given(st.integers(-1, 20), st.lists(st.integers(0, 12), min_size=6, max_size=6), st.integers(-1, 3))
def test_no_call_of_the_compiled_code_can_crash(bits, n, threads):
    packed, c, x, y = (
        torch.full((n[0] * n[1],), 255, dtype=torch.uint8),
        torch.zeros(n[2], n[3]),
        torch.zeros(n[4], n[5]),
        torch.zeros(n[4], n[1]),
    )
    for call in (
        lambda: native.decode(packed, bits, c, y, threads),
        lambda: native.multiply(packed, bits, c, x, y, threads),
        lambda: native.multiply_by_tables(packed, c, torch.zeros(n[4]), torch.zeros(n[5]), threads),
        lambda: native.gradient(packed, bits, x, c, threads),
        lambda: native.unpack(packed, bits, torch.zeros(n[4], dtype=torch.int32)),
        lambda: native.pack(torch.zeros(n[4], dtype=torch.int32), bits, packed),
    ):
        try:
            call()
        except (TypeError, ValueError):
            pass


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rebuilding_and_its_gradient_are_those_of_plain_indexing(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator).to(dtype)
    codes = torch.tensor([4, 0, 0, 2, 4, 4])  # codes 1 and 3 are never used; 2 lines of 8 entries, cut from 9
    upstream = torch.randn(2, 8, generator=generator).to(dtype)
    ours, plain = (values.clone().requires_grad_() for _ in range(2))
    result, expected = codebook.rebuild(ours, pack(codes, 3), 3, 2, 8), plain[codes].view(2, 9)[:, :8]
    assert torch.equal(result, expected)
    result.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance)
    assert not ours.grad[3].any()


def test_the_plain_gradient_takes_a_transposed_weight_gradient():
    """As backward hands it over where the kernels are not compiled, or on a GPU."""
    codes, _, bits, packed = layer(6, 8, 5, 4)
    grad_OI = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(5, 4).index_add_(0, codes.flatten(), grad_OI.T.contiguous().view(-1, 4))
    torch.testing.assert_close(codebook.gradient_reference(grad_OI.T, packed, bits, 5, 4), expected)
