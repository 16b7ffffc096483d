"""Exports of models whose matrices are no linear layers in transformers: stacked experts, GPT-2's transposed layers."""

import pickle
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.formats.export import FORMATS, _compared, export
from cluscomp.forms.apart import put_together
from cluscomp.forms.linear import compressed
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.stages.clustering import compress_block

EXPERTS = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts_per_tok": 2, "num_hidden_layers": 2,
}  # fmt: skip
FAMILIES = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "sliding_window": 5},  # turned stacks, with biases
    "jetmoe": {"hidden_size": 64, "intermediate_size": 32, "num_key_value_heads": 2, "kv_channels": 16}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2},
}  # fmt: skip
METHOD = RoundToNearest(bits=None, width=4, group=32, symmetric=True)


@pytest.fixture(scope="module")
def made(families, tmp_path_factory):
    """The checkpoint of a family, made once. Read it only."""
    found = {}

    def make(name):
        if name not in found:
            found[name] = tmp_path_factory.mktemp("checkpoints") / "model"
            original = Original(families(name, **FAMILIES[name]), torch.float32, torch.device("cpu"))
            model = original.load_all()
            for place, block in zip(block_names(model), blocks(model)):
                compress_block(METHOD, block, place, seed=0, statistics={})
            checkpoint.save(model, original.tokenizer, found[name])
        return found[name]

    return make


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits.float()


def opened(folder):
    """The model that plain transformers makes of a folder, every tensor of which it knows."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not compressed(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_dense_export_is_transformers_own_model(made, tmp_path, ids, caplog, name):
    model = checkpoint.load(made(name))
    with caplog.at_level("INFO", "cluscomp"):
        export(made(name), format="dense", output=tmp_path / "dense", dtype="float32")
    assert f"compared: {len(compressed(model))} layers are what safetensors reads, bit by bit" in caplog.text
    dense = opened(tmp_path / "dense")
    torch.testing.assert_close(logits(dense, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    names = load_file(tmp_path / "dense" / "model.safetensors").keys()
    assert name != "mixtral" or "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_was_taken_apart_is_pickled_and_copied(made, ids, name):
    model = checkpoint.load(made(name))
    expected = logits(model, ids)
    for again in (pickle.loads(pickle.dumps(model)), deepcopy(model)):
        for parameter in model.parameters():
            parameter.data.zero_()
        assert torch.equal(logits(again, ids), expected)
        model = again


@pytest.mark.parametrize("name", FAMILIES)
def test_dequantize_makes_transformers_own_model_in_memory(made, tmp_path, ids, name):
    model = checkpoint.load(made(name))
    expected = logits(model, ids)
    kind = type(model)
    dense = model.dequantize()
    torch.testing.assert_close(logits(dense, ids), expected, rtol=1e-5, atol=1e-5)
    own = kind(dense.config)
    assert isinstance(dense, PreTrainedModel) and {key: one.shape for key, one in dense.state_dict().items()} == {
        key: one.shape for key, one in own.state_dict().items()
    }
    kinds = {key: type(module) for key, module in own.named_modules()}
    assert {key: type(module) for key, module in dense.named_modules() if key != "lm_head"} == {
        key: kind for key, kind in kinds.items() if key != "lm_head"
    }
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(opened(tmp_path / "dense"), ids), logits(dense, ids))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_under_adapters_layers_stay_apart_until_they_are_merged(made, tmp_path, ids, caplog, name):
    peft = pytest.importorskip("peft")
    model = checkpoint.load(made(name))
    layers = [layer for layer in compressed(model) if "q_proj" in layer or "down_proj" in layer or "c_proj" in layer]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    expected = logits(model, ids)
    with caplog.at_level("WARNING", "cluscomp"):
        model.get_base_model().dequantize()
    assert "put_together" in caplog.text
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert put_together(merged) == []
    merged.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(opened(tmp_path / "dense"), ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_dense_export_without_a_layer_or_with_another_is_no_export(made, tmp_path, name):
    export(made(name), format="dense", output=tmp_path / "dense", dtype="float32")
    forms = {place: layer.stored for place, layer in compressed(checkpoint.load(made(name))).items()}
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    keys = [key for key in tensors if "h.0.attn.c_proj.weight" in key or ("layers.0." in key and ".w2" in key)]
    save_file(tensors | {keys[0]: tensors[keys[0]] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="reads weights that are off by"):
        _compared(FORMATS["dense"], tmp_path / "dense", forms)
    save_file({key: tensor for key, tensor in tensors.items() if key not in keys}, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"(attn\.c_proj|down_proj\.0): has no weight in the files"):
        _compared(FORMATS["dense"], tmp_path / "dense", forms)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "dense"])
def test_formats_of_linear_layers_refuse_them_and_leave_nothing(made, tmp_path, name, format_):
    layer = {"gpt2": r"h\.0\.attn\.c_attn", "mixtral": r"layers\.0\.mlp\.experts\.gate_up_proj\.0"}[name]
    words = f"not {name}" if format_ == "gguf" else f"{layer}: no linear layer .*format={format_} .*format=dense"
    with pytest.raises(InputError, match=words):
        export(made(name), format=format_, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
