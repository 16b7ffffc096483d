"""Methods on rotated weights (`cluster.rotation`): what the method is shown, what is stored, and that it is undone."""

import itertools

import pytest
import torch
from layers import heavy_tailed, relative_error
from pipelines import composed, pipeline
from torch.testing import assert_close

from cluscomp.errors import InputError
from cluscomp.forms.rotated import Rotated, rotated, signs_of_inputs, turned
from cluscomp.methods.turned import Turned
from cluscomp.solve.layer import Layer, Seen

SIDES = {"inputs": (True, False), "outputs": (False, True), "both": (True, True)}


def compressing(method, side, *more):
    return composed(f"method={method}", "bits=3", f"cluster.rotation={side}", *more).stages["cluster"].whole


def made(method, weights, x_TI, seed=7):
    """The stored forms of weights that read one input."""
    seen = Seen(method.sees()) if method.sees() else None
    if seen is not None:
        seen.add(x_TI)
    layers = {
        name: Layer(weight_OI, 0, seen, torch.Generator().manual_seed(1), seed) for name, weight_OI in weights.items()
    }
    return {name: stored for found in method.compress(layers) for name, stored in found.stored.items()}


@pytest.fixture(scope="module")
def case():
    return heavy_tailed(96)


def test_what_is_stored_is_what_the_method_makes_of_the_turned_weight_and_comes_back(case):
    """On every side, for methods that see nothing, a diagonal and a second moment; within the limit, seed and all."""
    weight_OI, x_TI = case
    for method, side in itertools.product(("rtn", "gptq", "squeezellm"), SIDES):
        found = made(compressing(method, side), {"q": weight_OI, "k": weight_OI[:48]}, x_TI)
        for name, stored in found.items():
            own_OI = weight_OI if name == "q" else weight_OI[:48]
            inputs, outputs = SIDES[side]
            assert isinstance(stored, Rotated) and (stored.inputs, stored.outputs) == (inputs, outputs)
            turned_OI = rotated(own_OI, stored.seed, inputs=inputs, outputs=outputs)
            error_OI = stored(torch.float32) - own_OI
            inner_error = stored.inner(torch.float32) - turned_OI
            assert_close(error_OI.norm(), inner_error.norm(), rtol=1e-5, atol=0)  # a rotation keeps lengths
            assert float(inner_error.detach().norm()) < float(turned_OI.norm())
        spent = sum(bits for stored in found.values() for bits in stored.ledger().values())
        assert spent <= 3 * 1.5 * weight_OI.numel()


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_a_seed_of_64_bits_is_stored_as_these_bits_and_turns_back(case, seed):
    weight_OI, x_TI = case
    stored = made(compressing("gptq", "both", "method.width=8", "bits=null"), {"w": weight_OI}, x_TI, seed)["w"]
    assert int(stored.seed) % 2**64 == seed
    assert relative_error(weight_OI, stored(torch.float32), x_TI) < 1e-3


def test_of_turned_inputs_the_second_moment_is_known():
    x_TI = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    seed = torch.tensor([3])
    seen, of_turned = Seen({"moment"}), Seen({"moment"})
    seen.add(x_TI)
    signs_I = signs_of_inputs(seed, 24)
    of_turned.add(turned(x_TI, signs_I))
    found = seen.through(lambda rows_TI: turned(rows_TI, signs_I))
    assert_close(found.matrix_II, of_turned.matrix_II)
    assert_close(found.diagonal_I, of_turned.diagonal_I)


def test_rounding_outliers_loses_less_after_a_rotation(case):
    weight_OI, x_TI = case
    weight_OI = weight_OI.clone()
    weight_OI[::7, ::11] *= 20
    width = ("method.width=4", "bits=null", "method.group=null")
    error = {}
    for side in ("none", "both"):
        stored = made(compressing("rtn", side, *width), {"w": weight_OI}, x_TI)["w"]
        error[side] = relative_error(weight_OI, stored(torch.float32), x_TI)
    assert error["both"] < 0.7 * error["none"]


def test_what_cannot_be_is_told_before_any_work():
    with pytest.raises(InputError, match=r"cluster\.rotation=both: this method asks for the mean size of inputs"):
        compressing("awq", "both")
    assert isinstance(compressing("awq", "outputs"), Turned)


def test_a_seed_that_leaves_too_little_is_told_in_a_sentence(case):
    weight_OI, x_TI = case
    tight = compressing("rtn", "both", "bits=1")
    with pytest.raises(ValueError, match=r"^w: bits=1\.0 is out of reach .*=both: its seed leaves 0\.9"):
        made(tight, {"w": weight_OI}, x_TI)


def test_a_run_plans_it_and_stores_no_more_than_its_limit(text, tmp_path):
    outcome = pipeline(
        "model=tiny", "bits=3", "method=gptq", "cluster.rotation=both", "data=text", f"data.file={text.file}",
        "cluster.samples=4", "cluster.length=32", "evaluate.context=32", "evaluate.limit=4", f"outputs={tmp_path}",
        f"cache={tmp_path}",
    )  # fmt: skip
    size, told = outcome.record.stages["cluster"]["size"], outcome.record.machine["predicted"]
    assert told["size"]["linear_bits_per_weight"] == size["linear_bits_per_weight"] <= 3
