"""OneBit: what SVID leaves of Gaussian weights, what is stored, values against all others, what cannot be."""

import numpy as np
import pytest
import torch
from layers import heavy_tailed, made_by, statistic_of
from pipelines import composed

from cluscomp.errors import InputError
from cluscomp.methods.onebit import OneBit
from cluscomp.plan import dry
from cluscomp.plan.meta import MetaModel, Place

METHOD = OneBit(bits=None, weighting="none", rounds=10)
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
        method = OneBit(bits=None, weighting=weighting, rounds=10)
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
