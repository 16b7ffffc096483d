"""Products with a dense weight of 16-bit numbers against plain torch."""

import pytest
import torch

from cluscomp.kernels import halves
from cluscomp.kernels.codebook import as_array
from cluscomp.kernels.loading import native


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("O,I", [(1, 1), (7, 15), (600, 33), (1030, 64), (9, 200)])
def test_a_product_is_that_with_the_weight_in_float32(O, I, dtype):
    weight_OI, x_BI = torch.randn(O, I).to(dtype), torch.randn(15, I)
    expected_BO = (x_BI.double() @ weight_OI.double().T).float()
    found_BO = halves.multiply(x_BI, weight_OI, threads=1)
    torch.testing.assert_close(found_BO, expected_BO, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(halves.multiply_reference(x_BI, weight_OI), expected_BO, rtol=1e-4, atol=1e-4)
    if native is not None:  # the same sums for other threads, and for each row alone
        assert torch.equal(halves.multiply(x_BI, weight_OI, threads=3), found_BO)
        assert torch.equal(torch.cat([halves.multiply(x_BI[b : b + 1], weight_OI) for b in range(15)]), found_BO)


@pytest.mark.skipif(native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512vbmi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_instruction_set_agrees(isa, dtype):
    weight_OI, x_BI, y_BO = torch.randn(70, 50).to(dtype), torch.randn(11, 50), torch.empty(11, 70)
    try:
        native.multiply_halves(*map(as_array, (weight_OI, x_BI, y_BO)), 1, isa)
    except ValueError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(y_BO, halves.multiply_reference(x_BI, weight_OI), rtol=1e-4, atol=1e-4)


def test_sizes_and_types_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="x has 3 inputs, the weight 4"):
        halves.multiply(torch.ones(1, 3), torch.ones(2, 4).half())
    with pytest.raises(ValueError, match=r"the weight torch\.float32; float32 and 16 bits are needed"):
        halves.multiply(torch.ones(1, 4), torch.ones(2, 4))
