"""Weights on uniform grids against numpy, a loop, and plain transformers; the choice of a grid against all of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.recipe import IDLE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.forms.layers import check_file, size_of
from cluscomp.forms.uniform import UniformWeight, bounds, grids_for, rounded_weight
from cluscomp.methods.on_grids import grid_of
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.stages.cluster import Cluster
from cluscomp.stages.clustering import compress_block
from cluscomp.store.tensor_files import tensor_bytes
from cluscomp.train.masters import Trained

ZEROS = ["none", "whole", "float16"]


def random_weight(out_features=5, in_features=11, width=3, groups=4, symmetric=False, scaled=False, seed=0):
    """A weight of random numbers with every extreme among them, and what it is made of, as numpy arrays."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**width, (out_features, in_features))
    codes[0, 0], codes[-1, -1] = 0, 2**width - 1
    scales = rng.uniform(0.1, 2, (out_features, groups)).astype(np.float16)
    zeros = rng.integers(0, 2**width, (out_features, groups))
    zeros[0, 0], zeros[-1, -1] = 0, 2**width - 1
    columns = rng.uniform(0.5, 2, in_features).astype(np.float16)
    weight = UniformWeight.from_codes(
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        None if symmetric else torch.from_numpy(zeros),
        width,
        torch.from_numpy(columns) if scaled else None,
    )
    return weight, codes, scales, zeros, columns


shapes = given(
    out_features=st.integers(1, 7),
    in_features=st.integers(5, 20),
    width=st.integers(1, 8),
    groups=st.integers(1, 5),
    symmetric=st.booleans(),
    scaled=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@shapes
def test_the_dense_weight_is_that_of_a_loop(out_features, in_features, width, groups, symmetric, scaled):
    weight, codes, scales, zeros, columns = random_weight(out_features, in_features, width, groups, symmetric, scaled)
    expected = np.empty((out_features, in_features))
    for o in range(out_features):
        for i in range(in_features):
            g = i * groups // in_features
            zero = zeros[o, g] if not symmetric else 2 ** (width - 1) if width > 1 else 0.5
            expected[o, i] = float(scales[o, g]) * (codes[o, i] - zero) * (float(columns[i]) if scaled else 1)
    np.testing.assert_allclose(weight(torch.float32).detach().numpy(), expected, rtol=1e-6, atol=1e-6)
    nearest_bfloat16 = torch.from_numpy(expected).float().bfloat16()
    torch.testing.assert_close(weight(torch.bfloat16), nearest_bfloat16, rtol=2**-7, atol=0)
    sizes = [group.stop - group.start for group in bounds(in_features, groups)]
    assert sum(sizes) == in_features and max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(weight.unpacked(), codes)


def bits_of(out_features, in_features, width, groups, zeros, scaled=False):
    """All stored bits, from shapes alone."""
    parts = UniformWeight.bits(
        out_features=out_features, in_features=in_features, width=width, groups=groups, zeros=zeros,
        scaled_inputs=scaled,
    )  # fmt: skip
    return sum(parts.values())


@settings(max_examples=60, deadline=None)
@shapes
def test_the_ledger_is_what_is_stored_and_what_the_solver_counts(
    out_features, in_features, width, groups, symmetric, scaled
):  # fmt: skip
    weight = random_weight(out_features, in_features, width, groups, symmetric, scaled)[0]
    ledger = weight.ledger()
    stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in weight.state_dict().values())
    assert sum(ledger.values()) == stored
    assert stored == bits_of(out_features, in_features, width, groups, "none" if symmetric else "whole", scaled)
    assert 0 <= ledger["padding"] < 2 * 8 * width
    assert weight.paper_bits() == stored - ledger["padding"]
    again = UniformWeight.empty(**weight.spec())
    again.load_state_dict(weight.state_dict())
    assert torch.equal(again(torch.float32), weight(torch.float32)) and again.ledger() == ledger


def test_bits_of_the_literatures_settings():
    """Widths plus the part of scales and zeros, of a matrix of Llama-2-7B: notes in papers and in llm-compressor."""
    shape = 4096, 4096
    assert bits_of(*shape, 4, 32, "whole") / 4096**2 == 4 + (16 + 4) / 128  # 4 bits, groups of 128
    assert bits_of(*shape, 3, 64, "whole") / 4096**2 == 3 + (16 + 3) / 64
    assert bits_of(*shape, 3, 32, "none") / 4096**2 == 3.125
    assert bits_of(*shape, 3, 1, "none") / 4096**2 == 3 + 16 / 4096


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.floats(1, 8), st.sampled_from(ZEROS), st.booleans())
@example(1, 45, 7.0, "whole", False)  # a group more whose zero fits into the padding
def test_the_grid_is_the_best_under_the_limit_of_all_there_are(out_features, in_features, bits, zeros, scaled):
    """By trying all: the largest width that fits with one group an output, then the most groups."""
    fitting = []
    for width in range(1, 9):
        for groups in range(1, in_features + 1):
            weight = UniformWeight.empty(
                out_features=out_features, in_features=in_features, width=width, groups=groups,
                zeros="none" if width == 1 and zeros == "whole" else zeros, scaled_inputs=scaled,
            )  # fmt: skip
            if sum(weight.ledger().values()) <= bits * out_features * in_features:
                fitting.append((width, groups))
    arguments = {"bits": bits, "width": None, "group": None, "zeros": zeros, "scaled_inputs": scaled}
    if not fitting:
        with pytest.raises(ValueError, match=rf"bits={bits} is out of reach .*{out_features} x {in_features}.*least"):
            grid_of(out_features, in_features, **arguments)
        return
    found = grid_of(out_features, in_features, **arguments)
    assert (found.width, found.groups) == max(fitting)


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits", [4, 3, 2, 3.3, 2.5])
def test_limits_are_met_closely_on_real_shapes(bits, zeros):
    for shape in [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096), (4096, 14_336)]:
        found = grid_of(*shape, bits=bits, width=None, group=None, zeros=zeros)
        size = found.bits / (shape[0] * shape[1])
        assert bits - 32 / shape[1] - 1e-3 < size <= bits
        if shape[1] > 2000:
            assert size > bits - 0.02


def test_a_grid_by_hand_has_groups_of_at_most_so_many_inputs():
    for group, groups in [(64, 9), (128, 5), (None, 1), (1000, 1)]:
        found = grid_of(192, 576, bits=None, width=3, group=group, zeros="whole")
        assert (found.width, found.groups) == (3, groups)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"bits=3 .* method\.width"):
        RoundToNearest(bits=None, width=None, group=64, symmetric=True)
    with pytest.raises(ValueError, match=r"bits=3.0 chooses .* 64"):
        RoundToNearest(bits=3.0, width=None, group=64, symmetric=True)


def test_scales_learn_and_are_rounded_put_back_or_refused():
    weight = random_weight()[0]
    before = {name: tensor.clone() for name, tensor in weight.state_dict().items()}
    state = weight.state_dict()
    weight.to_masters()
    assert weight.scales.dtype == torch.float32 and weight.scales.requires_grad
    weight(torch.float32).square().sum().backward()
    steps = weight.unpacked().float() - torch.from_numpy(np.repeat(weight.offsets().numpy(), [3, 3, 3, 2], 1))
    by_hand = torch.stack(
        [2 * weight.scales.detach()[:, g] * steps[:, group].square().sum(1) for g, group in enumerate(bounds(11, 4))],
        1,
    )
    torch.testing.assert_close(weight.scales.grad, by_hand)
    weight.scales.data *= 1.1
    weight.to_storage()
    assert weight.scales.dtype == torch.float16 and weight.scales.grad is None and not weight.scales.requires_grad
    torch.testing.assert_close(weight.scales.data, before["scales"] * 1.1, rtol=1e-3, atol=1e-3)
    weight.restore(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weight.state_dict().items())
    for wrong in (1e6, float("nan")):
        weight.to_masters()
        weight.scales.data[0, 0] = wrong
        with pytest.raises(ValueError, match="16-bit float"):
            weight.to_storage()


def test_damaged_scales_are_found():
    weight = random_weight()[0]
    weight.check()
    weight.scales.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="infinity"):
        weight.check()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_no_number_of_the_grid_is_nearer_than_the_chosen_one(width, symmetric):
    """Every weight against every value of its group's grid, which is made by hand from extremes and 0."""
    weight_OI = torch.randn(6, 20, generator=torch.Generator().manual_seed(width))
    weight_OI[2, :5] = 0  # a dead group
    weight_OI[3] = weight_OI[3].abs()  # all on one side
    even = symmetric or width == 1
    scales_OG, zeros_OG = grids_for(weight_OI, width, 4, symmetric=even)
    dense_OI = rounded_weight(weight_OI, scales_OG, zeros_OG, width, symmetric=even)(torch.float32).detach()
    for o in range(6):
        for g in range(4):
            values = weight_OI[o, 5 * g : 5 * g + 5].numpy().astype(np.float64)
            low, high, levels = min(values.min(), 0), max(values.max(), 0), 2**width - 1
            if not even:
                scale = float(np.float16((high - low) / levels))
                zero = np.clip(np.round(-low / scale), 0, levels) if scale else 0
            elif width > 1:
                scale, zero = float(np.float16(2 * max(-low, high) / levels)), 2 ** (width - 1)
            else:
                scale, zero = float(np.float16(2 * np.abs(values).mean())), 0.5
            assert float(scales_OG[o, g]) == pytest.approx(scale, rel=1e-3)
            grid = float(scales_OG[o, g]) * (np.arange(levels + 1) - zero)
            least = np.abs(values[:, None] - grid).min(1)
            chosen = dense_OI[o, 5 * g : 5 * g + 5].numpy()
            np.testing.assert_allclose(np.abs(values - chosen), least, rtol=1e-4, atol=1e-5)


def test_a_weight_too_large_for_16_bits_is_refused():
    with pytest.raises(ValueError, match="16-bit float"):
        grids_for(torch.full((2, 4), 1e6), 2, 1, symmetric=False)


@pytest.fixture(scope="module", params=[(3, 5, False), (4, None, True), (1, 8, True)], ids=str)
def saved(request, tiny_folder, tmp_path_factory):
    """A small Llama on uniform grids, in memory and saved."""
    width, group, symmetric = request.param
    original = Original(tiny_folder, torch.float32, torch.device("cpu"))
    model = original.load_all()
    method = RoundToNearest(bits=None, width=width, group=group, symmetric=symmetric)
    for name, block in zip(block_names(model), blocks(model)):
        compress_block(method, block, name, seed=0, statistics={})
    folder = tmp_path_factory.mktemp("saved") / "uniform"
    checkpoint.save(model, original.tokenizer, folder)
    return model, folder, method


def test_plain_transformers_loads_it_with_the_same_logits(saved, ids):
    model, folder, method = saved
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected)
        assert torch.equal(checkpoint.load(folder)(ids).logits, expected)
    check_file(size_of(model), tensor_bytes(folder))
    stored = load_file(folder / "model.safetensors")
    assert any(name.endswith("stored.zeros") for name in stored) != method.symmetric


def test_training_changes_scales_alone(saved, ids):
    model, folder, _ = saved
    model = checkpoint.load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = Trained(model, codebooks=True, others={})
    trained.start()
    optimizer = torch.optim.SGD(trained.parameters, lr=1e-3)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert trained.finish() is None
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.endswith("stored.scales") for name in changed)
    trained.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("group, void", [(32, True), (16, True), (8, True), (64, False), (24, False), (None, False)])
def test_the_grid_of_a_4_bit_file_is_refused(families, tmp_path, group, void):
    """A model from a GGUF file of 4 bits lies on groups of 32: other widths, groups and models are welcome."""
    folder = shutil.copytree(families("llama", hidden_size=64, intermediate_size=96, head_dim=16), tmp_path / "model")
    cluster = Cluster(method=RoundToNearest(bits=None, width=4, group=group, symmetric=False), **IDLE)
    original = Original(folder, torch.float32, torch.device("cpu"))
    cluster.check(original)
    (folder / "gguf.json").write_text(json.dumps({"quantised": ["Q8_0", "Q4_1"]}))
    three = Cluster(method=RoundToNearest(bits=None, width=3, group=group, symmetric=False), **IDLE)
    three.check(original)
    if void:
        with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj: 4 bits .* void.*Q4_1.*method\.group=64"):
            cluster.check(original)
    else:
        cluster.check(original)
    (folder / "gguf.json").write_text(json.dumps({"quantised": ["Q8_0"]}))
    cluster.check(original)
