"""Grids, rounding and weights that learn: against their definitions, and by the blocks' losses on a tiny model."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from layers import correlated, made_by, statistic_of
from reference.recipe import IDLE
from test_block_finetune import CPU, stage, tensors

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.forms.layers import specs
from cluscomp.forms.linear import compressed
from cluscomp.forms.uniform import UniformWeight
from cluscomp.methods.awq import Awq
from cluscomp.methods.gptq import Gptq
from cluscomp.methods.hqq import Hqq
from cluscomp.methods.onebit import OneBit
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.models.original import Original, blocks
from cluscomp.plan.meta import MetaModel
from cluscomp.stages import Job
from cluscomp.stages.cluster import Cluster
from cluscomp.train.rounding import LearnedRounding, LearnedSigns, LearnedWeights

SHAPE = {"bits": None, "width": 2, "group": 8}
METHODS = {
    "whole zeros": RoundToNearest(**SHAPE, symmetric=False),
    "no zeros": RoundToNearest(**SHAPE, symmetric=True),
    "one bit": RoundToNearest(**SHAPE | {"width": 1}, symmetric=True),
    "any zeros": Hqq(**SHAPE, norm=0.7, beta=10.0, kappa=1.01, iterations=3),
    "scaled inputs": Awq(**SHAPE, symmetric=False, steps=4, clip=0),
}


def begun(name: str, *, offsets: bool) -> tuple[torch.Tensor, UniformWeight, LearnedRounding]:
    """A weight, what is stored of it, and that beginning to learn."""
    weight_OI, x_TI = correlated(6, 20, 3)
    method = METHODS[name]
    stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator()).requires_grad_(False)
    learned = LearnedRounding(weight_OI, stored, offsets=offsets)
    learned.to_masters()
    return weight_OI, stored, learned


def by_hand(weight, factors, offset, zeros, width):
    """One group's values of one output in float64: its grid spans `factors` times its ends."""
    levels = 2**width - 1
    low, high = min(weight.min(), 0) * factors[0], max(weight.max(), 0) * factors[1]
    if zeros == "none":
        size = np.abs(weight).mean() * np.mean(factors) if width == 1 else max(-low, high)
        scale, zero = 2 * size / levels, 0.5 if width == 1 else 2 ** (width - 1)
    else:
        scale = (high - low) / levels
        zero = -low / scale
        zero = np.clip(np.round(zero), 0, levels) if zeros == "whole" else zero
    return scale * (np.clip(np.round(weight / scale + zero + offset), 0, levels) - zero)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_dense_weight_is_that_of_the_definition(name, offsets):
    weight_OI, stored, learned = begun(name, offsets=offsets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in (learned.low, learned.high):
            factor.copy_(torch.rand(factor.shape, generator=generator) * 1.2)  # offsets: what is above 1 is cut
        if learned.offset is not None:
            learned.offset.copy_(torch.rand(weight_OI.shape, generator=generator) * 1.6 - 0.8)
    factors = [
        (v.detach().clamp(0, 1) if offsets else v.detach().sigmoid()).double().numpy()
        for v in (learned.low, learned.high)
    ]
    offset = np.zeros(weight_OI.shape)
    if learned.offset is not None:
        offset = learned.offset.detach().clamp(-0.5, 0.5).double().numpy()
    columns = np.ones(20) if stored.inputs is None else stored.inputs.double().numpy()
    weight = weight_OI.double().numpy() / columns
    expected = np.empty_like(weight)
    for o in range(6):
        for g in range(3):
            at = np.flatnonzero(np.arange(20) * 3 // 20 == g)
            ends = factors[0][o, g], factors[1][o, g]
            expected[o, at] = by_hand(weight[o, at], ends, offset[o, at], stored.kind_of_zeros, stored.width)
    found = learned(torch.float32).detach().double().numpy()
    np.testing.assert_allclose(found, expected * columns, rtol=1e-4, atol=1e-5)
    learned.to_storage()  # what is stored is that, but for scales of 16 bits
    near = learned.stored(torch.float32).double().numpy()
    assert np.mean(np.abs(near - expected * columns) > 5e-3 * np.abs(expected * columns).max()) < 0.02
    assert learned.stored.spec() == stored.spec() and learned.stored.ledger() == stored.ledger()
    assert torch.equal(learned(torch.float32), learned.stored(torch.float32))
    learned.restore({})
    assert learned.stored is stored and torch.equal(learned(torch.float32), stored(torch.float32))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_part_learns_and_lowers_the_outputs_error(name, offsets):
    weight_OI, _, learned = begun(name, offsets=offsets)
    _, x_TI = correlated(6, 20, 3)

    def loss() -> torch.Tensor:
        return (x_TI @ (learned(torch.float32) - weight_OI).T).square().mean()

    first = loss()
    found = torch.autograd.grad(first, list(learned.parameters()))  # each is asked for, and takes part
    assert all(bool(gradient.isfinite().all()) for gradient in found) and any(bool(part.any()) for part in found)
    best = float(first)
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.01 if offsets else 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        for parameter in learned.parameters():
            parameter.grad.sign_()
        optimizer.step()
        best = min(best, float(loss().detach()))
    assert best < (0.8 if offsets else 0.97) * float(first)


FEEDBACK = Gptq(**SHAPE, symmetric=False, damping=0.01, act_order=False, static_groups=False)


@pytest.mark.parametrize("name", [*METHODS, "feedback"])
def test_weights_begin_as_they_are_stored_and_round_with_the_gradient_of_what_is_not(name):
    weight_OI, x_TI = correlated(6, 20, 3)
    method = (METHODS | {"feedback": FEEDBACK})[name]
    stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator()).requires_grad_(False)
    learned = LearnedWeights(weight_OI, stored)
    learned.to_masters()
    dense_OI = learned(torch.float32)
    if stored.kind_of_zeros != "float16":  # whose stored zeros stand for what 16 bits leave of them
        assert torch.equal(dense_OI, stored(torch.float32))
    wanted_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1))
    (found_OI,) = torch.autograd.grad((dense_OI * wanted_OI).sum(), [learned.weight])
    within_OI = learned.unrounded(*learned.grids()).round()
    within_OI = (within_OI >= 0) & (within_OI <= 2**stored.width - 1)  # what lies outside its grid is cut
    columns_I = torch.ones(20) if stored.inputs is None else stored.inputs.float()
    torch.testing.assert_close(found_OI, torch.where(within_OI, wanted_OI * columns_I, 0.0))
    learned.to_storage()
    assert torch.equal(learned.stored.unpacked(), stored.unpacked()) and learned.stored.spec() == stored.spec()
    learned.restore({})
    assert learned.stored is stored


@pytest.mark.parametrize("name", [*METHODS, "feedback"])
def test_weights_scales_and_zeros_learn_and_lower_the_outputs_error(name):
    weight_OI, x_TI = correlated(6, 20, 3)
    method = (METHODS | {"feedback": FEEDBACK})[name]
    stored = made_by(method, weight_OI, statistic_of(x_TI), torch.Generator()).requires_grad_(False)
    learned = LearnedWeights(weight_OI, stored)

    def loss(dense_OI: torch.Tensor) -> torch.Tensor:
        return (x_TI @ (dense_OI - weight_OI).T).square().mean()

    first = float(loss(stored(torch.float32)))
    learned.to_masters()
    begun = {key: parameter.detach().clone() for key, parameter in learned.named_parameters()}
    assert begun.keys() == {"weight", "scales"} | (set() if stored.zeros is None else {"zeros"})
    best, rates = first, {"weight": 3e-3, "scales": 1e-3, "zeros": 3e-3}
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "lr": rates[key]} for key, parameter in learned.named_parameters()], weight_decay=0.0
    )
    for _ in range(150):
        optimizer.zero_grad()
        found = loss(learned(torch.float32))
        found.backward()
        optimizer.step()
        best = min(best, float(found.detach()))
    assert all(not torch.equal(parameter, begun[key]) for key, parameter in learned.named_parameters())
    assert best < 0.95 * first
    learned.to_storage()
    assert learned.stored.ledger() == stored.ledger()


def test_signs_begin_as_they_are_stored_and_learn_with_the_gradient_of_the_authors():
    weight_OI, x_TI = correlated(6, 20, 3)
    method = OneBit(bits=None, weighting="none", rounds=10, post_norm=False)
    stored = made_by(method, weight_OI, None, torch.Generator()).requires_grad_(False)
    dense_OI = stored(torch.float32)
    learned = LearnedSigns(-weight_OI, stored)  # of which no sign is the stored one
    learned.to_masters()
    assert torch.equal(learned(torch.float32), dense_OI) and bool((learned.weight.abs() == 1e-3).all())
    learned = LearnedSigns(weight_OI, stored)
    learned.to_masters()
    assert torch.equal(learned(torch.float32), dense_OI)
    torch.testing.assert_close(
        learned.weight * dense_OI.abs(), weight_OI.clamp(-4 * dense_OI.abs(), 4 * dense_OI.abs())
    )
    wanted_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1))
    (found_OI,) = torch.autograd.grad((learned(torch.float32) * wanted_OI).sum(), [learned.weight])
    torch.testing.assert_close(found_OI, wanted_OI * dense_OI.abs() * (1.001 - learned.weight.tanh() ** 2))

    def loss():
        return (x_TI @ (learned(torch.float32) - weight_OI).T).square().mean()

    first = best = float(loss().detach())
    optimizer = torch.optim.Adam([{"params": [learned.weight], "lr": 3e-2}, {"params": [learned.scales], "lr": 1e-3}])
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        best = min(best, float(loss().detach()))
    assert best < 0.8 * first
    learned.to_storage()
    assert learned.stored.spec() == stored.spec() and not torch.equal(learned.stored.codes, stored.codes)
    torch.testing.assert_close(learned(torch.float32), learned.dense(), rtol=2e-3, atol=1e-5)
    learned.restore({})
    assert learned.stored is stored and torch.equal(learned(torch.float32), dense_OI)


def test_signs_and_values_of_blocks_come_nearer_to_the_original(families, text, tmp_path):
    original = Original(families("llama", num_hidden_layers=1), torch.float32, CPU)
    model = original.model()
    Cluster(method=OneBit(bits=None, weighting="none", rounds=10, post_norm=False), **IDLE).run(
        model, Job(tmp_path, 0, original)
    )
    before, shapes, after = tensors(model), specs(model), {}
    for learns, changes in {"values": {"scales"}, "weights": {"codes", "scales"}}.items():
        (tmp_path / learns).mkdir()
        learning, job = deepcopy(model), Job(tmp_path / learns, 0, original)
        given = {"lr": 1e-3, "weights_lr": 1e-2, "epochs": 10, "schedule": "cosine"}
        (numbers,) = stage(text, **given, learns=learns).run(learning, job)["blocks"]
        after[learns], now = numbers["after"], learning.state_dict()
        assert specs(learning) == shapes and numbers["after"] < numbers["before"]
        assert {name.rpartition(".")[2] for name in before if not torch.equal(before[name], now[name])} == changes
    assert after["weights"] < 0.9 * after["values"]


@pytest.fixture(scope="module")
def rounded(families, tmp_path_factory):
    """A small Llama rounded to 3 bits, original and folder."""
    original = Original(families("llama"), torch.float32, CPU)
    model = original.model()
    folder = tmp_path_factory.mktemp("rounded")
    method = RoundToNearest(bits=None, width=3, group=8, symmetric=False)
    Cluster(method=method, **IDLE).run(model, Job(folder / "parts", 0, original))
    checkpoint.save(model, original.tokenizer, folder / "checkpoint")
    return original, folder / "checkpoint"


def rebuilt_weights(model) -> list[torch.Tensor]:
    """The numbers of all compressed weights of each block."""
    return [
        torch.cat([layer.stored(torch.float32).detach().flatten() for layer in compressed(block).values()])
        for block in blocks(model)
    ]


LEARN = {
    "values": {"lr": 1e-3},
    "clipping": {"lr": 5e-2, "epochs": 10},
    "rounding": {"lr": 2e-2, "epochs": 10, "schedule": "linear", "order": "shuffled"},
    "weights": {"lr": 1e-3, "weights_lr": 1e-3, "epochs": 10, "schedule": "cosine"},
}


@pytest.mark.parametrize("learns", LEARN)
def test_blocks_come_nearer_to_the_original_in_the_same_bits(rounded, text, tmp_path, learns):
    original, folder = rounded
    model = checkpoint.load(folder)
    before, shapes, dense = tensors(model), specs(model), rebuilt_weights(model)
    found = stage(text, learns=learns, **LEARN[learns]).run(model, Job(tmp_path, 0, original))["blocks"]
    assert all(numbers["after"] < numbers["before"] for numbers in found)
    for numbers, was, now in zip(found, dense, rebuilt_weights(model), strict=True):
        moved = float((now - was).square().sum() / was.square().sum())
        assert learns == "values" or (numbers["moved"] == pytest.approx(moved, rel=1e-4) and moved > 1e-4)
    assert specs(model) == shapes
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], model.state_dict()[name])}
    expected = {"values": {"scales"}, "weights": {"codes", "scales"}}.get(learns, {"codes", "scales", "zeros"})
    assert changed - {"zeros"} == expected - {"zeros"} and (learns == "weights" or changed == expected)
    checkpoint.save(model, original.tokenizer, tmp_path / "checkpoint")
    again = checkpoint.load(tmp_path / "checkpoint")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_rounding_that_makes_all_worse_is_taken_back(rounded, text, tmp_path):
    original, folder = rounded
    model = checkpoint.load(folder)
    before = tensors(model)
    found = stage(text, learns="clipping", lr=1e4).run(model, Job(tmp_path, 0, original))
    assert found["kept"] == 3 and all(numbers["attempts"] == 3 for numbers in found["blocks"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(isinstance(layer.stored, UniformWeight) for layer in compressed(model).values())


def test_weights_on_no_grid_are_refused_before_any_work(families, text):
    """By the plan, which knows what the stages before will have made."""
    from reference.recipe import NO_DATA, PAPER, STORED

    from cluscomp.methods.cluscomp import ClusComp

    original = Original(families("llama"), torch.float32, CPU)
    outline = MetaModel(original.config, torch.float32, "cpu")
    method = ClusComp(bits=None, vector_dim=4, codebook_size=16, iterations=5, **PAPER, **STORED, **NO_DATA)
    Cluster(method=method, **IDLE).cost(outline)
    stage(text).cost(outline)
    stage(text, learns="means").cost(outline)
    for learns in ("clipping", "rounding", "weights"):
        with pytest.raises(InputError, match=rf"learns={learns} needs .*method=rtn.*q_proj is a CodebookWeight"):
            stage(text, learns=learns).cost(outline)


def test_codebooks_are_refused_where_there_are_none(families, text):
    original = Original(families("llama"), torch.float32, CPU)
    outline = MetaModel(original.config, torch.float32, "cpu")
    method = RoundToNearest(bits=None, width=3, group=8, symmetric=False)
    Cluster(method=method, **IDLE).cost(outline)
    with pytest.raises(InputError, match=r"learns=means needs .*method=ipq.*q_proj is a UniformWeight"):
        stage(text, learns="means").cost(outline)


def test_it_is_counted_as_memory_and_keys_are_those_of_before(families, text):
    original = Original(families("llama"), torch.float32, CPU)
    outline = MetaModel(original.config, torch.float32, "cpu")
    method = RoundToNearest(bits=None, width=3, group=8, symmetric=False)
    Cluster(method=method, **IDLE).cost(outline)
    peaks = [sum(stage(text, learns=learns).cost(outline).device.values()) for learns in LEARN]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)
    later = {"codes", "moves", "codes_lr", "weights_lr", "held_out", "skip"}
    assert stage(text).without_effect() == {"streams", "learns"} | later
    assert stage(text, learns="rounding").without_effect() == {"streams"} | later
    weights, moving = stage(text, learns="weights", held_out=1), stage(text, codes="moving", skip=1)
    assert weights.without_effect() == {"streams", "codes", "moves", "codes_lr", "skip"}
    assert moving.without_effect() == {"streams", "learns", "weights_lr", "held_out"}


def test_values_and_gradients_are_those_of_the_autoround_package():
    """Of a layer on 2 bits with whole zeros: numbers, and what factors and offsets learn from them."""
    package = pytest.importorskip("auto_round.data_type.int", reason="auto-round is not installed")
    weight_OI, _ = correlated(6, 24, 3)
    stored = made_by(METHODS["whole zeros"], weight_OI, None, torch.Generator()).requires_grad_(False)
    learned = LearnedRounding(weight_OI, stored, offsets=True)
    learned.to_masters()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for factor in (learned.low, learned.high):
            factor.copy_(0.5 + 0.5 * torch.rand(factor.shape, generator=generator))
        learned.offset.copy_(torch.rand(weight_OI.shape, generator=generator) - 0.5)
    parts = [learned.low, learned.high, learned.offset]
    theirs = [part.detach().clone().requires_grad_(True) for part in parts]
    low, high, offset = (theirs[0].flatten(), theirs[1].flatten(), theirs[2].view(-1, 8))
    dense_OI, _, _ = package.quant_tensor_asym(
        weight_OI, bits=2, group_size=8, v=offset, min_scale=low, max_scale=high, scale_dtype=torch.float32
    )
    torch.testing.assert_close(learned(torch.float32), dense_OI)
    wanted_OI = torch.randn(weight_OI.shape, generator=generator)
    found = torch.autograd.grad((learned(torch.float32) * wanted_OI).sum(), parts)
    expected = torch.autograd.grad((dense_OI * wanted_OI).sum(), theirs)
    for ours, their in zip(found, expected):
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-5)
