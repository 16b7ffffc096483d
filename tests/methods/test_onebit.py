"""OneBit: what SVID leaves of Gaussian weights, what is stored, values against all others, what cannot be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layers import heavy_tailed, made_by, statistic_of
from pipelines import composed, pipeline

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.formats.export import export
from cluscomp.forms.layers import put_in
from cluscomp.forms.linear import compressed
from cluscomp.forms.stored import build, described
from cluscomp.methods.onebit import OneBit
from cluscomp.plan import dry
from cluscomp.plan.meta import MetaModel
from cluscomp.plan.places import Place
from cluscomp.train.masters import rounding

METHOD = OneBit(bits=None, weighting="none", rounds=10, post_norm=False)
SMOLLM2 = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
SMOLLM2 |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}


def test_of_gaussian_weights_it_leaves_1_less_2_over_pi_and_is_the_first_singular_pair_of_their_sizes():
    weight_OI = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    stored = made_by(METHOD, weight_OI, None, torch.Generator())
    dense_OI = stored(torch.float32).detach()
    left = float((dense_OI - weight_OI).square().sum() / weight_OI.square().sum())
    assert left == pytest.approx(1 - 2 / np.pi, abs=0.003)
    assert torch.equal(stored.signs(torch.float32), weight_OI.sign())
    left_OM, sizes_M, right_MI = torch.linalg.svd(weight_OI.abs())
    torch.testing.assert_close(
        dense_OI.abs(), sizes_M[0] * left_OM[:, :1].abs() * right_MI[:1].abs(), rtol=2e-3, atol=0
    )


def test_it_stores_a_bit_a_weight_and_its_values():
    places = {name: Place(*shape, 0) for name, shape in SMOLLM2.items()}
    forms = dry.compress(METHOD, places, torch.float32).stored
    bits = {name: sum(form.ledger().values()) for name, form in forms.items()}
    weights = {name: o * i for name, (o, i) in SMOLLM2.items()}
    assert all(bits[name] == o * i + 16 * (o + i) for name, (o, i) in SMOLLM2.items())
    assert sum(bits.values()) / sum(weights.values()) == pytest.approx(1.046, abs=5e-4)


def test_values_fitted_to_inputs_that_count_lose_less_of_what_counts():
    weight_OI, x_TI = heavy_tailed()
    seen = statistic_of(x_TI, "diagonal")

    def lost(weighting):
        method = replace(METHOD, weighting=weighting)
        dense_OI = made_by(method, weight_OI, seen if method.sees() else None, torch.Generator())(
            torch.float32
        ).detach()
        return float(((dense_OI - weight_OI).square() * seen.diagonal_I).sum())

    assert lost("diagonal") < 0.99 * lost("none")


def test_limits_below_what_its_shape_stores_are_refused_before_any_work():
    """1.056 bits for the matrices of 576 x 576; so bits=1 is none that a small model can meet."""
    method = composed("method=onebit", "bits=1").stages["cluster"].method
    with pytest.raises(ValueError, match=r"q: bits=1.0 is out of reach for a 576 x 576 matrix: .* store 1.056"):
        dry.compress(method, {"q": Place(576, 576, 0)}, torch.float32)
    assert composed("method=onebit").stages["cluster"].method.bits is None


def test_its_signs_can_learn_but_no_grids(families):
    from transformers import AutoConfig

    outline = MetaModel(AutoConfig.from_pretrained(families("llama", num_hidden_layers=1)), torch.float32, "cpu")
    stages = composed("method=onebit", "block_finetune=onebit_quick", "order=[cluster,block_finetune]").stages
    stages["cluster"].cost(outline)
    assert stages["block_finetune"].cost(outline).device
    other = composed("method=onebit", "block_finetune=omniquant_quick", "order=[cluster,block_finetune]").stages
    with pytest.raises(InputError, match=r"learns=clipping needs a method on uniform grids.*is a SignWeight"):
        other["block_finetune"].cost(outline)


def normalising(method=METHOD):
    """A layer with a bias whose weight is stored with the norm, alone in a model; and its dense weight."""
    weight_OI = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    model = torch.nn.ModuleList([torch.nn.Linear(32, 24)])
    put_in(model, "0", made_by(replace(method, post_norm=True), weight_OI, None, torch.Generator()))
    return model, weight_OI


def test_a_layer_with_the_norm_normalises_what_it_gives_before_its_bias_and_stores_no_more():
    model, weight_OI = normalising()
    (layer,) = model
    layer.stored.to_masters()
    x_BI = torch.randn(5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y_BO = layer(x_BI)
    expected_BO = F.layer_norm(x_BI @ layer.stored(torch.float32).T, (24,)) + layer.bias
    torch.testing.assert_close(y_BO, expected_BO)
    for ours, theirs in zip(
        torch.autograd.grad(y_BO.square().sum(), [x_BI, layer.stored.scales]),
        torch.autograd.grad(expected_BO.square().sum(), [x_BI, layer.stored.scales]),
    ):
        torch.testing.assert_close(ours, theirs)
    plain = made_by(METHOD, weight_OI, None, torch.Generator())
    assert layer.stored.ledger() == plain.ledger() and "post_norm" not in plain.spec()
    assert build(described(layer.stored)).post_norm and not build(described(plain)).post_norm


def test_signs_that_learn_keep_the_norm():
    model, weight_OI = normalising()
    before = model[0].stored
    with rounding(model, {"0": weight_OI}, "weights"):
        x_BI = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model[0](x_BI), F.layer_norm(x_BI @ before(torch.float32).T, (24,)) + model[0].bias)
        model[0].stored.to_masters()
        model[0].stored.to_storage()
    assert model[0].stored is not before and model[0].stored.post_norm


def test_a_checkpoint_keeps_the_norm_and_no_other_format_takes_it(ground):
    outcome = pipeline(
        "model=tiny", "data=text", f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", "method=onebit",
        f"outputs={ground / 'outputs'}", "method.post_norm=true", "method.weighting=none", "evaluate.after=[]",
        "evaluate.context=32",
    )  # fmt: skip
    model = checkpoint.load(outcome.checkpoint)
    assert all(layer.stored.post_norm for layer in compressed(model).values())
    with pytest.raises(InputError, match="q_proj: normalises what it gives"):
        model.dequantize()
    with pytest.raises(InputError, match=r"its layers normalise what they give .* format=gguf does not"):
        export(outcome.checkpoint, format="gguf", output=ground / "gguf")
    with pytest.raises(InputError, match="nothing can stand beside or around what normalises"):
        composed("method=onebit", "method.post_norm=true", "cluster.rotation=both")
