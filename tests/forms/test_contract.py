"""What every stored form keeps, alone and made of others: bits, files, training, the planner's model.

Forms are those of KINDS, filled with random content from their shapes alone. A form whose `empty` asks for something
that `ARGUMENTS` does not know yet fails with its name.
"""

import copy
import inspect
import json
from collections import OrderedDict
from itertools import cycle, islice

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save as save_tensors
from transformers import AutoConfig, AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.forms import adapters, linear
from cluscomp.forms import codebook as codebook_form
from cluscomp.forms.entropy import EntropyWeight
from cluscomp.forms.layers import KINDS, build_all, check_file, check_values, put_in, size_of, specs
from cluscomp.forms.linear import can_stay_rebuilt, compressed, rebuilt
from cluscomp.forms.masked import Masked
from cluscomp.forms.rotated import Rotated
from cluscomp.forms.stored import build, described, nested, shapes
from cluscomp.forms.sum import Sum
from cluscomp.kernels.codes import pack
from cluscomp.kernels.dependent import round_on_paths
from cluscomp.kernels.entropy import write
from cluscomp.models.original import Original, blocks, linears
from cluscomp.plan.meta import MetaModel
from cluscomp.stages.parts import put_part, read_part, save_part
from cluscomp.store.tensor_files import tensor_bytes
from cluscomp.train.masters import Trained, fit

CPU = torch.device("cpu")


def codebook(o, i, axis="out"):
    sizes = {"vector_dim": 4, "codebook_size": 16, "codebooks": 1, "storage": "float16"}
    return {"kind": "codebook", "out_features": o, "in_features": i, "axis": axis} | sizes


def uniform(o, i):
    sizes = {"width": 3, "groups": 4, "zeros": "whole", "scaled_inputs": False}
    return {"kind": "uniform", "out_features": o, "in_features": i} | sizes


def plain(o, i):
    return {"kind": "plain", "out_features": o, "in_features": i}


def low_rank(o, i):
    return {"kind": "low_rank", "left": plain(o, 3), "right": plain(3, i)}


def signs(o, i, scaled_outputs=True):
    sizes = {"scaled_outputs": scaled_outputs, "scaled_inputs": True}
    return {"kind": "signs", "out_features": o, "in_features": i} | sizes


def some_numbers(o, i):
    return torch.randn(i, o, generator=torch.Generator().manual_seed(o * i)).mul(1.5).round().to(torch.int8)


def rotated(inner, inputs=True, outputs=True):
    return {"kind": "rotated", "inner": inner, "inputs": inputs, "outputs": outputs}


def some_levels(o, i):
    wanted_IO = torch.randn(i, o, generator=torch.Generator().manual_seed(0))
    parts = [
        round_on_paths(rows, torch.eye(len(rows)), torch.full((len(rows),), 0.5), None) for rows in wanted_IO.split(64)
    ]
    return torch.cat([levels_RO for levels_RO, _, _ in parts])


ARGUMENTS = {  # what forms ask for: values for a weight (O, I), to be tried in turn
    "out_features": lambda o, i: [o],
    "in_features": lambda o, i: [i],
    "axis": lambda o, i: ["out", "in"],
    "vector_dim": lambda o, i: [4, 3],
    "codebook_size": lambda o, i: [16],
    "codebooks": lambda o, i: [1, 2],
    "storage": lambda o, i: ["float16", "float8", "int8", "float16"],
    "scaled": lambda o, i: [True, False, False, False],
    "width": lambda o, i: [3, 4, 1],
    "groups": lambda o, i: [4, 5],
    "normal_float.width": lambda o, i: [4, 2],
    "zeros": lambda o, i: ["none", "whole", "float16"],
    "scaled_inputs": lambda o, i: [True, False],
    "scaled_outputs": lambda o, i: [True, False],
    "stream_bytes": lambda o, i: [len(write(some_numbers(o, i))), len(write(some_levels(o, i), dependent=True))],
    "dependent": lambda o, i: [False, True],
    "left": lambda o, i: [plain(o, 3), uniform(o, 4), signs(o, 5)],
    "right": lambda o, i: [plain(3, i), plain(4, i), signs(5, i, scaled_outputs=False)],
    "masked.inner": lambda o, i: [codebook(o, -(-i // 2)), uniform(o, -(-i // 2)), low_rank(o, -(-i // 2))],
    "inner": lambda o, i: [codebook(o, i), uniform(o, i), low_rank(o, i)],
    "inputs": lambda o, i: [True, False, True],
    "outputs": lambda o, i: [True, True, False],
    "tile_outputs": lambda o, i: [16, 8, 16],
    "tile_inputs": lambda o, i: [16, 4, 16],
    "state_bits": lambda o, i: [12, 9, 16],
    "narrow": lambda o, i: [0, 2, 1],
    "code": lambda o, i: ["3inst", "1mad", "3inst"],
    "trellis.scaled_outputs": lambda o, i: [True],  # one number a matrix lowers no loss of random targets
    "lattice.scaled_outputs": lambda o, i: [True],
    "signs.scaled_outputs": lambda o, i: [True, True, False],
    "signs.scaled_inputs": lambda o, i: [True, False, True],
    "post_norm": lambda o, i: [False],  # what its layer does is no dense layer's: tests/methods/test_onebit.py
    "parts": lambda o, i: [[uniform(o, i), low_rank(o, i)], [low_rank(o, i)] * 3],
}


def examples(kind, o, i):
    """Specs of one kind for a weight (O, I): each value of the argument that has the most, others beside it."""
    values = {
        name: ARGUMENTS.get(f"{kind}.{name}", ARGUMENTS.get(name))(o, i)
        for name in inspect.signature(KINDS[kind].empty).parameters
    }
    count = max(map(len, values.values()))
    columns = {name: list(islice(cycle(one), count)) for name, one in values.items()}
    return [{"kind": kind} | {name: column[n] for name, column in columns.items()} for n in range(count)]


CASES = {f"{kind}-{n}": (kind, n) for kind in KINDS for n in range(len(examples(kind, 32, 48)))}
MADE = {
    "codebook + low rank": lambda o, i: {"kind": "sum", "parts": [codebook(o, i), low_rank(o, i)]},
    "rotated codebook": lambda o, i: rotated(codebook(o, i)),
    "rotated codebook along the inputs": lambda o, i: rotated(codebook(o, i, "in"), outputs=False),
    "rotated uniform": lambda o, i: rotated(uniform(o, i)),
    "rotated entropy": lambda o, i: rotated(examples("entropy", o, i)[0]),
    "rotated trellis": lambda o, i: rotated(examples("trellis", o, i)[1]),
    "rotated lattice": lambda o, i: rotated(examples("lattice", o, i)[1]),
    "rotated sum": lambda o, i: rotated({"kind": "sum", "parts": [codebook(o, i), low_rank(o, i)]}),
}


@pytest.fixture(scope="module", params=[*CASES, *MADE])
def spec_of(request):
    """What makes the spec of one form for a weight (O, I)."""
    if request.param in MADE:
        return MADE[request.param]
    kind, number = CASES[request.param]
    return lambda o, i: examples(kind, o, i)[number]


def filled(spec, seed=0):
    """A form of this spec with random content: numbers of some 0.1, codes of any bits, positive scales."""
    form, generator = build(spec), torch.Generator().manual_seed(seed)
    for name, tensor in form.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) * (10 if tensor.itemsize == 1 else 0.1)
            values = values.abs() + 0.01 if name.endswith(("scales", "inputs", "steps")) else values
            tensor.copy_(values / 64 if tensor.dtype == torch.float32 else values)  # scales of codebooks of 8 bits
        else:
            limits = torch.iinfo(tensor.dtype)
            tensor.copy_(torch.randint(limits.min, limits.max, tensor.shape, dtype=tensor.dtype, generator=generator))
    for part in form.modules():
        if isinstance(part, Masked):  # which keeps as many inputs of each output
            kept_OI = torch.rand(part.out_features, part.in_features, generator=generator).argsort(1)
            part.mask.copy_(pack((kept_OI < part.inner.in_features).flatten().int(), 1))
        if isinstance(part, EntropyWeight):  # not any bytes are a stream
            of = some_levels if part.dependent else some_numbers
            part.stream.copy_(write(of(part.out_features, part.in_features), dependent=part.dependent))
    return form.requires_grad_(False)


def kept(form):
    return {name: tensor.clone() for name, tensor in form.state_dict().items()}


def same(state, form):
    now = form.state_dict()
    return state.keys() == now.keys() and all(
        tensor.dtype == now[name].dtype and torch.equal(tensor.view(torch.uint8), now[name].view(torch.uint8))
        for name, tensor in state.items()
    )


@pytest.mark.parametrize("shape", [(32, 48), (33, 47), (24, 576)], ids=str)
def test_bits_are_those_of_the_tensors_and_follow_from_the_spec(spec_of, shape):
    form = filled(spec_of(*shape))
    spec = json.loads(json.dumps(form.spec()))
    ledger = form.ledger()
    assert (form.out_features, form.in_features) == shape
    assert ledger == type(form).bits(**spec)
    assert all(type(bits) is int and bits >= 0 for bits in ledger.values())
    raw = save_tensors(form.state_dict())
    assert sum(ledger.values()) == 8 * (len(raw) - 8 - int.from_bytes(raw[:8], "little"))
    assert sum(ledger.values()) - ledger.get("padding", 0) <= form.paper_bits()
    again = type(form).empty(**spec)
    assert again.spec() == form.spec() and again.ledger() == ledger
    again.load_state_dict(form.state_dict())
    assert torch.equal(again(torch.float32), form(torch.float32))


def test_the_dense_weight_comes_in_every_dtype_in_tiles_and_as_a_product(spec_of):
    form = filled(spec_of(24, 48))
    dense_OI = form(torch.float32)
    assert dense_OI.shape == (24, 48) and dense_OI.dtype == torch.float32 and bool(dense_OI.any())
    for dtype in (torch.bfloat16, torch.float16):
        assert form(dtype).dtype == dtype
        torch.testing.assert_close(form(dtype).float(), dense_OI, rtol=2e-2, atol=2e-2)
    assert [number for tile in form.tiles() for number in range(48)[tile]] == list(range(48))
    x_BI = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    product_BO = form.product(x_BI)
    if product_BO is not None:
        torch.testing.assert_close(product_BO, x_BI @ dense_OI.T, rtol=1e-4, atol=1e-5)
    none_BO = form.product(x_BI[:0])  # of an expert that no token was sent to
    assert none_BO is None or none_BO.shape == (0, 24)


@torch.no_grad()
def test_a_weight_that_stays_rebuilt_gives_the_same_bits_and_goes(spec_of):
    model = torch.nn.ModuleList([torch.nn.Linear(48, 32, bias=False)])
    put_in(model, "0", filled(spec_of(32, 48)))
    layer, x_BTI = model[0], torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(3))
    expected_BTO = layer(x_BTI)
    with rebuilt(model, torch.float32):
        assert torch.equal(layer.dense, layer.stored(torch.float32))
        assert torch.equal(layer(x_BTI), expected_BTO)
        assert layer(x_BTI.bfloat16()).dtype == torch.bfloat16  # not from what is there in another type
        assert "0.dense" not in model.state_dict()
    assert layer.dense is None


def test_only_small_weights_without_tiles_stay_rebuilt(monkeypatch):
    model = torch.nn.ModuleList([torch.nn.Linear(48, 32), torch.nn.Linear(48, 32)])
    put_in(model, "0", filled(codebook(32, 48)))
    assert can_stay_rebuilt(model) == [model[0]]
    monkeypatch.setattr(linear, "MOST_REBUILT", 32 * 48 - 1)
    assert can_stay_rebuilt(model) == []
    monkeypatch.setattr(linear, "MOST_REBUILT", 32 * 48)
    monkeypatch.setattr(codebook_form, "TILE", 32 * 8)
    assert len(model[0].stored.tiles()) == 6 and can_stay_rebuilt(model) == []


def test_training_lowers_a_loss_is_stored_and_can_be_taken_back(spec_of):
    model = torch.nn.ModuleList([torch.nn.Linear(48, 32)])
    put_in(model, "0", filled(spec_of(32, 48)))
    (layer,) = compressed(model).values()
    before, dense_OI = kept(layer.stored), layer.stored(torch.float32).clone()
    generator = torch.Generator().manual_seed(2)
    x_BI = torch.randn(64, 48, generator=generator)
    wanted_BO = layer(x_BI).detach() + x_BI @ (0.05 * torch.randn(32, 48, generator=generator)).T
    loss = lambda _=None: F.mse_loss(layer(x_BI), wanted_BO)  # noqa: E731
    at_first = float(loss().detach())
    trained = Trained(model, codebooks=True, others={})
    trained.start()
    assert trained.parameters and all(p.dtype == torch.float32 and p.requires_grad for p in trained.parameters)
    torch.testing.assert_close(layer.stored(torch.float32).detach(), dense_OI, rtol=1e-5, atol=1e-6)
    plain_steps = {"weight_decay": 0.0, "schedule": "constant", "warmup": 0.0, "clip": None, "half": False}
    assert fit(trained.parameters, loss, range(20), lr=2e-3, **plain_steps) is None
    assert 0 < trained.moved() < 1
    assert trained.finish() is None
    assert layer.stored.spec() == shapes(described(filled(spec_of(32, 48))))
    assert all(tensor.dtype == before[name].dtype for name, tensor in layer.stored.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in layer.stored.parameters())
    assert float(loss().detach()) < at_first
    trained.restore()
    assert same(before, layer.stored) and torch.equal(layer.stored(torch.float32), dense_OI)


def test_masters_that_do_not_fit_are_refused(spec_of):
    for wrong in (torch.nan, 1e9):
        form = filled(spec_of(32, 48))
        before, state = kept(form), form.state_dict()
        form.to_masters()
        next(form.parameters()).data.flatten()[0] = wrong
        with pytest.raises(ValueError, match="16-bit float"):
            form.to_storage()
        form.restore(state)
        assert same(before, form)


def test_the_backward_pass_keeps_no_dense_weight(spec_of):
    model = torch.nn.ModuleList([torch.nn.Linear(48, 32)])
    put_in(model, "0", filled(spec_of(32, 48)))
    (layer,) = compressed(model).values()
    layer.stored.to_masters()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.ones(2, 48, requires_grad=True)).sum().backward()
    masters = {parameter.data_ptr() for parameter in layer.stored.parameters()}
    forward = [t for t in saved if t.data_ptr() in masters or t.shape == (2, 48)]
    assert len(forward) >= 1 + len(masters)
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.stored.parameters())


def test_damage_is_found(spec_of):
    form = filled(spec_of(32, 48))
    form.check()
    floats = [name for name, tensor in form.state_dict().items() if tensor.is_floating_point()]
    assert floats
    for name in floats:
        damaged = filled(spec_of(32, 48))
        damaged.state_dict()[name].flatten()[-1] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity among its"):
            damaged.check()


# in a model


@pytest.fixture(scope="module")
def original(families):
    """A model to copy, and its tokenizer. One block: what a form does in a model, it does in each."""
    opened = Original(families("llama", tie_word_embeddings=True, num_hidden_layers=1), torch.float32, CPU)
    return opened.load_all(), opened.tokenizer


def model_of(original, spec_of):
    """A tiny model with such a form in the place of every linear layer."""
    model = copy.deepcopy(original[0])
    for block in blocks(model):
        for number, (name, dense) in enumerate(linears(block).items()):
            put_in(block, name, filled(spec_of(dense.out_features, dense.in_features), number))
    return model


@pytest.fixture(scope="module")
def written(spec_of, original, tmp_path_factory):
    """Such a model in memory and as a checkpoint."""
    folder = tmp_path_factory.mktemp("forms") / "model"
    model = model_of(original, spec_of)
    checkpoint.save(model, original[1], folder)
    return model, folder


@torch.no_grad()
def test_a_checkpoint_gives_the_same_logits(written, ids):
    model, folder = written
    logits = model(ids).logits
    assert bool(logits.isfinite().all())
    check_file(size_of(model), tensor_bytes(folder))
    assert sum(size_of(model).ledger.values()) == 8 * tensor_bytes(folder)
    ours = checkpoint.load(folder)
    assert torch.equal(ours(ids).logits, logits) and specs(ours) == specs(model)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, logits)


def off(logits, expected):
    return float((logits.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_in_16_bits_and_saves_what_it_computes_after_a_cast(written, ids, tmp_path, dtype):
    model, folder = written
    expected = model(ids).logits
    assert off(checkpoint.load(folder, dtype)(ids).logits, expected) < 0.05
    cast = checkpoint.load(folder).to(dtype)
    cast.save_pretrained(tmp_path / "cast")
    assert off(checkpoint.load(tmp_path / "cast", torch.float32)(ids).logits, expected) < 0.1


def test_what_was_unfrozen_trains_under_autocast_and_takes_back_what_was_saved(written, ids):
    _, folder = written
    model = checkpoint.load(folder)
    expected = model(ids).logits.detach()
    trained = checkpoint.unfreeze(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert all(bool(one.grad.isfinite().all()) for one in trained) and any(one.grad.any() for one in trained)
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for one in trained:
        one.data.mul_(2)
    model.load_state_dict(load_tensors(folder / "model.safetensors"), strict=False)
    assert {one.dtype for one in trained} == {torch.float32} and all(one.requires_grad for one in trained)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), masters[name], rtol=1e-6, atol=0)
    assert off(model(ids).logits.detach(), expected) < 1e-5


@torch.no_grad()
def test_a_part_of_a_stage_comes_back(spec_of, original, tmp_path):
    model = model_of(original, spec_of)
    save_part(tmp_path / "part", blocks(model)[0], {"n": 1})
    part = read_part(tmp_path / "part")
    fresh = copy.deepcopy(original[0])
    put_part(blocks(fresh)[0], part)
    for (_, ours), (_, theirs) in zip(compressed(blocks(fresh)[0]).items(), compressed(blocks(model)[0]).items()):
        assert same(theirs.stored.state_dict(), ours.stored)


def test_a_damaged_layer_is_named(spec_of, original):
    model = model_of(original, spec_of)
    name, layer = list(compressed(model).items())[-1]
    floats = [tensor for tensor in layer.stored.state_dict().values() if tensor.is_floating_point()]
    floats[0].flatten()[0] = torch.nan
    with pytest.raises(InputError, match=f"{name}: NaN or infinity .* damaged"):
        check_values(model)


def test_the_planner_counts_what_the_file_takes_and_a_training_pass(written):
    model, folder = written
    outline = MetaModel(AutoConfig.from_pretrained(folder), torch.float32, "cpu")
    assert outline.compressed
    ledger = {part: bits for part, bits in outline.size().ledger.items() if part != "kept"}
    assert ledger == {part: bits for part, bits in size_of(model).ledger.items() if part != "kept"}
    train, once = outline.training(1, 2), outline.forward(1, 2)
    assert train.work.flops > once.work.flops > 0 and train.peak > 0
    learning = [p for layer in compressed(outline.block).values() for p in layer.stored.parameters()]
    assert outline.codebook_numbers(outline.block) == sum(p.numel() for p in learning)
    assert not any(p.requires_grad or p.dtype == torch.float32 for p in learning)


def test_adapters_learn_above_it_as_above_a_dense_weight_and_change_nothing_below(spec_of, original, ids):
    pytest.importorskip("peft")
    model = model_of(original, spec_of)
    before = {name: kept(layer.stored) for name, layer in compressed(model).items()}
    logits = model(ids).logits.detach()
    adapters.add(model, rank=2, alpha=4.0, seed=0)
    torch.testing.assert_close(model(ids).logits.detach(), logits, rtol=1e-4, atol=1e-4)
    matrices = adapters.parameters(model)
    generator = torch.Generator().manual_seed(3)
    for matrix in matrices.values():
        matrix.data.copy_(0.1 * torch.randn(matrix.shape, generator=generator))
        matrix.requires_grad_(True)

    def gradients():
        loss = model(ids).logits.float().square().mean()
        return torch.autograd.grad(loss, list(matrices.values()))

    found = gradients()
    layers = compressed(model)
    assert all(same(state, layers[f"{name}.base_layer"].stored) for name, state in before.items())
    for name, layer in layers.items():
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight.data, dense.bias = layer.stored(torch.float32), layer.bias
        model.set_submodule(name, dense)
    for ours, theirs in zip(found, gradients()):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_a_backward_pass_through_adapters_keeps_no_dense_weight(spec_of):
    """Of three layers together: what is saved, but for what is stored anyway, is less than a third of one of them."""
    pytest.importorskip("peft")
    model = torch.nn.Sequential(OrderedDict((name, torch.nn.Linear(96, 96, bias=False)) for name in "abc"))
    for seed, name in enumerate("abc"):
        put_in(model, name, filled(spec_of(96, 96), seed))
    adapters.add(model, rank=1, alpha=1.0, seed=0)
    for matrix in adapters.parameters(model).values():
        matrix.requires_grad_(True)
    stored = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        loss = model(torch.ones(1, 96)).sum()
    loss.backward()
    assert 0 < sum(size for place, size in saved.items() if place not in stored) < 0.3 * 96 * 96 * 4


# forms made of forms that share


def sharing(make):
    """Two forms whose codebooks are one, as `make(codebook)` has them."""
    inner = [filled(codebook(o, 48) | {"scaled": True}, seed=o) for o in (32, 24)]
    inner[1].follow(inner[0])
    return [make(one) for one in inner]


def test_shared_codebooks_inside_a_rotation_are_counted_and_written_once():
    seed = torch.tensor([3])
    forms = sharing(lambda inner: Rotated(inner, seed.clone(), inputs=True, outputs=True))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(48, 32), "b": torch.nn.Linear(48, 24)})
    for name, form in zip(model, forms):
        put_in(model, name, form)
    stored = checkpoint.stored_state(model)
    inside = {name: tensor for name, tensor in stored.items() if ".stored." in name}
    assert sum(size_of(model).ledger.values()) == 8 * sum(tensor.nbytes for tensor in stored.values())
    assert "b.stored.inner.codebooks" not in inside and "a.stored.inner.codebooks" in inside
    assert specs(model)["b"]["shares"] == "a"
    built, shared = build_all(json.loads(json.dumps(specs(model))))
    assert shared == {"b.stored.inner.codebooks": "a.stored.inner.codebooks"}
    assert built["b"].inner.codebooks is built["a"].inner.codebooks
    assert built["b"].ledger() == forms[1].ledger() and forms[1].ledger()["codebooks"] == 0


def test_a_form_that_shares_only_a_part_is_refused():
    forms = sharing(lambda inner: Sum([inner, filled(low_rank(inner.out_features, 48))]))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(48, 32), "b": torch.nn.Linear(48, 24)})
    for name, form in zip(model, forms):
        put_in(model, name, form)
    with pytest.raises(ValueError, match="b: some of what it trains is stored by another layer"):
        specs(model)


def test_forms_that_cannot_share_say_so():
    for spec in (uniform(32, 48), low_rank(32, 48), rotated(uniform(32, 48))):
        with pytest.raises(ValueError, match="cannot share"):
            filled(spec).follow(filled(spec))
    with pytest.raises(ValueError, match="cannot share"):
        filled(codebook(32, 48)).follow(filled(uniform(32, 48)))
    with pytest.raises(ValueError, match="cannot share"):
        filled(rotated(codebook(32, 48))).follow(filled(rotated(uniform(32, 48))))


def test_a_kind_that_is_not_known_is_named_inside_a_spec():
    spec = rotated(uniform(32, 48) | {"kind": "spiral"})
    assert [one["kind"] for one in nested(spec)] == ["spiral"]
    with pytest.raises(ValueError, match="kind 'spiral'; this version knows codebook, uniform"):
        build(spec)
