"""Mask and adapter beside codes, and SLiM's grid: against all others, their definitions, limits of bits."""

import pytest
import torch
from layers import heavy_tailed, made_by, statistic_of
from layers import planned as planned_layer
from pipelines import composed
from pydantic import ValidationError
from reference.recipe import IDLE

from cluscomp.errors import InputError
from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.masked import Masked
from cluscomp.forms.sum import Sum
from cluscomp.methods.beside import Beside
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.methods.slim_quant import SlimQuant
from cluscomp.plan import dry
from cluscomp.plan.places import Place
from cluscomp.solve import beside
from cluscomp.solve.along_outputs import damped, output_error
from cluscomp.solve.layer import Layer

NOTHING = {"keep": 1.0, "of": None, "rank": None, "rank_share": None, "saliency": "none"}
NOTHING |= {"adapter_bits": 16, "damping": 0.01}
SLIM = {"keep": 0.5, "of": 4, "rank": None, "rank_share": 0.1, "saliency": "diagonal", "adapter_bits": 4}
GRID = SlimQuant(bits=None, width=4, bins=2048)


@pytest.fixture(scope="module")
def layer():
    """A weight, and what is seen of its inputs."""
    weight_OI, x_TI = heavy_tailed()
    return weight_OI, statistic_of(x_TI, "moment")


def made(layer, method, **changed):
    weight_OI, seen = layer
    around = Beside(**NOTHING | changed).around(method)
    return made_by(around, weight_OI, seen if around.sees() else None, torch.Generator().manual_seed(0))


# the grid


@pytest.mark.parametrize("width", [4, 2, 1])
def test_the_clip_is_nearly_the_best_of_all(layer, width):
    weight_OI, _ = layer
    stored = made_by(SlimQuant(bits=None, width=width, bins=2048), weight_OI, None, torch.Generator()).requires_grad_(
        False
    )
    assert stored.kind_of_zeros == "none" and len(stored.scales.unique()) == 1
    zero = 2 ** (width - 1) if width > 1 else 0.5

    def left(scale):
        numbers_OI = (weight_OI / scale + zero).round().clamp(0, 2**width - 1)
        return float(((numbers_OI - zero) * scale - weight_OI).square().sum())

    best = min(left(2 * clip * float(weight_OI.abs().max()) / (2**width - 1)) for clip in torch.linspace(0.005, 1, 200))
    assert left(float(stored.scales[0])) < 1.03 * best


# the mask


def test_of_every_four_neighbours_the_two_of_most_saliency_are_kept(layer):
    weight_OI, seen = layer
    form = made(layer, GRID, keep=0.5, of=4, saliency="diagonal")
    assert type(form) is Masked and form.inner.in_features == 128
    kept_OI = form(torch.float32) != 0
    scores_OI = weight_OI.abs() * seen.diagonal_I.sqrt()
    mask_OI = beside.largest(scores_OI, 0.5, 4)
    assert bool((mask_OI.view(-1, 4).sum(1) == 2).all()) and not bool((kept_OI & ~mask_OI).any())
    second = scores_OI.view(-1, 4).topk(2).values[:, 1:]
    assert torch.equal(mask_OI.view(-1, 4), scores_OI.view(-1, 4) >= second)
    inner = form.inner(torch.float32)
    assert torch.equal(form(torch.float32)[mask_OI].view(256, 128), inner)
    assert form.ledger() == {"masks": 256**2, "padding": 0, "codes": 4 * 256 * 128, "scales": 16 * 256, "zeros": 0}


def test_neighbours_at_the_end_and_half_of_an_output():
    scores_OI = torch.tensor([[1.0, 4, 3, 2, 5, 9, 8], [7, 6, 5, 4, 3, 2, 1]])
    assert beside.largest(scores_OI, 0.5, 4).int().tolist() == [[0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0]]
    assert beside.largest(scores_OI, 0.5, None).int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]
    assert [beside.kept_inputs(inputs, 0.5, 4) for inputs in (1, 3, 4, 5, 7, 8)] == [1, 2, 2, 3, 4, 4]


# the adapter


def test_each_adapter_is_the_best_by_its_own_measure(layer):
    weight_OI, seen = layer
    moment_II = damped(seen.matrix_II, 0.01)
    sizes_I = seen.diagonal_I.sqrt()
    error_OI = weight_OI - made(layer, GRID)(torch.float32).detach()
    by = {"none": {}, "diagonal": {"sizes_I": sizes_I}, "full": {"moment_II": moment_II}}
    left = {}
    for name, known in by.items():
        left_OR, right_RI = beside.nearest_of_rank(error_OI, 26, **known)
        assert left_OR.shape == (256, 26) and right_RI.shape == (26, 256)
        left[name] = error_OI - left_OR @ right_RI
    measures = {
        "none": lambda e_OI: float(e_OI.square().sum()),
        "diagonal": lambda e_OI: float((e_OI * sizes_I).square().sum()),
        "full": lambda e_OI: output_error(e_OI, moment_II),
    }
    for own, measure in measures.items():
        assert all(measure(left[own]) <= 1.0001 * measure(other_OI) for other_OI in left.values()), own
    full = measures["full"]
    assert full(left["full"]) < 0.95 * full(left["diagonal"]) < 0.95 * full(left["none"])
    values_I = torch.linalg.svdvals(error_OI.double() @ torch.linalg.cholesky(moment_II.double()))
    assert full(left["full"]) == pytest.approx(float(values_I[26:].square().sum()), rel=1e-3)


@pytest.mark.parametrize("bits", [16, 4])
def test_the_weight_is_compressed_again_with_the_adapter_in_place(layer, bits):
    """By a grid of 2 bits, so that there is something to gain; an adapter of 4 bits is nearly as good as one of 16."""
    coarse = SlimQuant(bits=None, width=2, bins=2048)
    form = made(layer, coarse, **SLIM | {"adapter_bits": bits, "rank_share": None, "rank": 26})
    masked, adapter = form.parts
    assert (type(form), type(masked), type(adapter)) == (Sum, Masked, LowRank)
    weight_OI, seen = layer
    dense_OI = adapter(torch.float32).detach()
    mask_OI = beside.largest(weight_OI.abs() * seen.diagonal_I.sqrt(), 0.5, 4)
    rest = made_by(coarse, (weight_OI - dense_OI)[mask_OI].view(256, 128), None, torch.Generator())
    assert torch.equal(masked.inner(torch.float32), rest(torch.float32))
    assert not bool((masked(torch.float32) != 0)[~mask_OI].any())

    def lost(stored):
        return float(((stored(torch.float32).detach() - weight_OI).square() * seen.diagonal_I).sum())

    without = made(layer, coarse, keep=0.5, of=4, saliency="diagonal")
    assert lost(form) < 0.7 * lost(without)
    numbers = 26 * 512 * bits + (0 if bits == 16 else 2 * 16 * 16)
    assert sum(form.ledger().values()) == sum(without.ledger().values()) + numbers


# any method, any limit


PLACES = {"one": Place(576, 576, 0), "other": Place(192, 576, 0)}


def planned(*overrides, places=None):
    """The method of the command line on some layers of a block, without numbers."""
    stage = composed("data=pydoc", *overrides).stages["cluster"]
    return stage, dry.compress(
        stage.whole, places or {"one": Place(576, 576, 0), "other": Place(192, 576, 0)}, torch.float32
    )


def bits_of(found, places):
    return sum(sum(form.ledger().values()) for form in found.stored.values()) / places


def test_an_adapter_is_one_override_of_any_method_and_within_its_bits(layer):
    for method in ("cluscomp", "aqlm", "qtip"):
        stage, found = planned(f"method={method}", "bits=3", "beside.rank=8")
        assert {type(form) for form in found.stored.values()} == {Sum}
        assert 2.8 < bits_of(found, 576 * (576 + 192)) <= 3, method
    weight_OI, seen = layer
    around = stage.beside.around(RoundToNearest(bits=3.0, width=None, group=None, symmetric=False))
    stored = made_by(around, weight_OI, seen, torch.Generator())
    assert stored.spec() == dry.compress(around, {"layer": Place(256, 256, 0)}, torch.float32).stored["layer"].spec()
    assert sum(stored.ledger().values()) <= 3 * 256**2


def test_codebooks_can_be_masked_where_they_look_at_no_inputs(layer):
    stage, _ = planned("method=cluscomp_data_free", "bits=3", "beside.keep=0.5")
    stored = made_by(stage.whole, *layer, torch.Generator().manual_seed(0))
    assert bool(((stored(torch.float32) != 0).sum(1) <= 128).all())
    assert 2.5 < sum(stored.ledger().values()) / 256**2 <= 3


def test_slim_is_its_grid_with_mask_and_adapter_within_a_limit_or_by_hand():
    stage, found = planned("method=slim", "method.width=4")
    assert stage.beside == Beside(**NOTHING | SLIM)
    ledger = found.stored["one"].ledger()
    assert ledger["codes"] == 4 * 576 * 288 + 4 * 58 * 1152 and ledger["masks"] == 576**2
    _, limited = planned("method=slim", "bits=3")
    assert bits_of(limited, 576 * (576 + 192)) <= 3


def test_what_cannot_be_is_refused_before_any_work():
    places = {"one": Place(64, 64, 0)}
    for wrong, told in {
        ("beside.rank=0",): r"beside\.rank = 0: .*greater than or equal to 1",
        ("beside.keep=0.0",): r"beside\.keep = 0",
        ("beside.rank=4", "beside.rank_share=0.1"): "give beside.rank or beside.rank_share, not both",
    }.items():
        with pytest.raises(InputError, match=told):
            composed("method=rtn", "bits=3", *wrong)
    for wrong, told in {
        ("beside.keep=0.01",): "one: beside.keep=0.01 keeps none of 64 inputs",
        ("beside.keep=0.5", "method=gptq"): r"one: beside.keep=0.5 packs .* does not look at inputs.*; Gptq does",
        ("beside.keep=0.2", "beside.of=4"): "one: beside.keep=0.2 keeps none of 4 inputs",
        ("beside.rank=65",): "one: beside.rank=65 is more than a 64 x 64 matrix has: 64 at most",
        ("beside.rank=32",): r"one: bits=3.0 is out of reach: mask and adapter take 16.000 of it and leave -13.000",
    }.items():
        with pytest.raises(ValueError, match=told):
            planned("method=rtn", "bits=3", *wrong, places=places)
    with pytest.raises(ValidationError):
        Beside(**NOTHING | {"adapter_bits": 8})


@pytest.mark.parametrize("share", ["input", "experts", "block"])
def test_layers_with_adapters_share_no_codebook_while_masked_ones_may(share):
    """Or the block could not be stored: such a layer would share some of what it trains, and not all."""
    cluscomp = "method=cluscomp_data_free", "bits=3", f"method.share={share}"
    for adapter in ("beside.rank=4", "beside.rank_share=0.1"):
        with pytest.raises(
            InputError, match=rf"method\.share={share} does not go with {adapter}: .*method\.share=none"
        ):
            composed(*cluscomp, adapter)
    stage, found = planned(*cluscomp, "beside.keep=0.5")
    assert stage.beside.masked and {type(form) for form in found.stored.values()} == {Masked}


def block(inputs=128):
    """Three layers of one input, and one of another."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (128, 0), "k": (64, 0), "v": (64, 0), "o": (128, 1)}
    return {
        name: Layer(torch.randn(outputs, inputs, generator=generator), input_, None, torch.Generator(), 5)
        for name, (outputs, input_) in shapes.items()
    }


def of_a_block(*overrides):
    """What the method of the command line makes of a block's layers; bits per weight of each, and of all."""
    stage = composed("data=pydoc", *overrides).stages["cluster"]
    found = {name: form for one in stage.whole.compress(block()) for name, form in one.stored.items()}
    bits = {name: sum(form.ledger().values()) for name, form in found.items()}
    per_weight = {name: bits[name] / form.out_features / 128 for name, form in found.items()}
    return found, per_weight, sum(bits.values()) / 128 / 384


@pytest.mark.parametrize("rotation", ["none", "outputs"])
def test_layers_that_a_method_looks_at_together_it_sees_together_also_turned(rotation):
    data_free = "method=cluscomp_data_free", "bits=3", f"cluster.rotation={rotation}"
    shared, _, _ = of_a_block(*data_free, "method.share=input", "beside.keep=0.5", "beside.saliency=none")
    books = {id(parameter) for name in "qkv" for parameter in shared[name].parameters()}
    assert len(books) == len(list(shared["q"].parameters()))
    _, bits, mean = of_a_block(*data_free, "method.allocation=fill", "beside.rank=2", "beside.saliency=none")
    assert 2.9 < mean <= 3 and len({round(one, 2) for one in bits.values()}) > 1


def test_what_is_given_to_every_matrix_alike_stays_so_with_an_adapter():
    _, bits, _ = of_a_block(
        "method=cluscomp_data_free", "bits=4", "method.allocation=uniform", "beside.rank=2", "beside.saliency=none"
    )
    assert max(bits.values()) <= 4


def test_an_adapter_takes_nothing_from_a_limit_beyond_8_bits():
    given = "method=low_rank", "method.weighting=none", "bits=12"
    _, _, mean = of_a_block(*given, "beside.rank=2", "beside.saliency=none")
    assert 11 < mean <= 12


def test_nothing_beside_is_the_method_itself_and_makes_no_other_key():
    stage = composed("method=rtn", "bits=3").stages["cluster"]
    assert stage.whole is stage.method and "beside" in stage.without_effect()
    assert Beside(**NOTHING).around(GRID) is GRID and IDLE["beside"] == Beside(**NOTHING)
    adapted = composed("method=rtn", "bits=3", "beside.rank=4").stages["cluster"]
    assert "beside" not in adapted.without_effect() and adapted.calibrated


@pytest.mark.parametrize("shape", [(1, 200), (200, 1)])
def test_an_adapter_of_a_single_row_or_column_is_stored_in_4_bits_as_planned(shape):
    weight_OI = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    method = Beside(**NOTHING | {"rank": 1, "adapter_bits": 4}).around(GRID)
    stored = made_by(method, weight_OI, None, torch.Generator().manual_seed(0))
    assert sum(stored.ledger().values()) == sum(planned_layer(method, *shape).ledger().values())
    assert float((stored(torch.float32).detach() - weight_OI).square().mean()) < 0.01


def test_a_moment_that_no_adapter_can_be_fitted_by_is_told_with_the_layers_name():
    weight_OI, x_TI = torch.randn(16, 64), torch.randn(3, 64)
    method = Beside(**NOTHING | {"rank": 2, "saliency": "full", "damping": 1e-12}).around(GRID)
    layers = {"mlp.up": Layer(weight_OI, 0, statistic_of(x_TI, "moment"), torch.Generator())}
    with pytest.raises(ValueError, match=r"^mlp\.up: .* larger beside\.damping"):
        list(method.compress(layers))
