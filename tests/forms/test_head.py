"""Output embeddings that are read in 16 bits."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from cluscomp.forms import head as heads
from cluscomp.forms.head import Head
from cluscomp.kernels.loading import native


def head(weight_OI: torch.Tensor, bias: bool = False) -> Head:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias)
    layer.weight = nn.Parameter(weight_OI)
    layer.__class__ = Head
    return layer


@pytest.mark.skipif(native is None, reason="needs the compiled kernels")
def test_a_head_gives_the_product_with_its_weight_as_it_is_now():
    weight_OI, x = torch.randn(40, 24).bfloat16().float(), torch.randn(2, 3, 24)
    layer = head(weight_OI, bias=True)
    exact = nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer._halves.float(), weight_OI)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (exact - layer.bias), rtol=1e-5, atol=1e-4)
        layer.weight.data.mul_(2)  # which no version tells of: merged adapters do so
        torch.testing.assert_close(layer(x) - layer.bias, 4 * (exact - layer.bias), rtol=1e-5, atol=1e-4)
        layer.weight.add_(1e-4)  # no 16 bits hold this
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) and layer._halves is None
    with torch.inference_mode():
        made = head(weight_OI.clone())
        torch.testing.assert_close(made(x), x @ weight_OI.T, rtol=1e-5, atol=1e-5)


def test_gradients_many_rows_and_other_dtypes_are_an_ordinary_linear_layers():
    weight_OI = torch.randn(40, 24).half().float()
    layer, plain = head(weight_OI), nn.Linear(24, 40, bias=False)
    plain.weight = nn.Parameter(weight_OI)
    x = torch.randn(5, 24, requires_grad=True)
    assert torch.equal(layer(x), plain(x)) and layer(x).requires_grad
    with torch.no_grad():
        many = torch.randn(9, 24)
        assert torch.equal(layer(many), plain(many)) and layer._halves is None
        narrow, x_BI = deepcopy(layer).bfloat16(), torch.randn(2, 24).bfloat16()
        assert torch.equal(narrow(x_BI), deepcopy(plain).bfloat16()(x_BI))


def test_without_compiled_kernels_it_is_an_ordinary_linear_layer(monkeypatch):
    """Torch would make the weight's 32 bits anew for each token."""
    monkeypatch.setattr(heads, "native", None)
    layer, x_BI = head(torch.randn(40, 24).half().float()), torch.randn(2, 24)
    with torch.no_grad():
        assert torch.equal(layer(x_BI), nn.functional.linear(x_BI, layer.weight)) and layer._halves is None
