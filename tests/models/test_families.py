"""Families that are not a list of blocks of linear layers by transformers' plain names: opened, walked and planned."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed import opened, streamed_logits
from transformers import AutoConfig, AutoModelForCausalLM

from cluscomp.errors import InputError
from cluscomp.forms.apart import KeptLinear, stacks, take_apart, together
from cluscomp.models.original import blocks, linears, norms
from cluscomp.plan.meta import MetaModel

GPT = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64}
ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = ROPE | {"num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
FAMILIES = {
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 3},  # blocks give tuples, and get alibi
    "falcon": {"hidden_size": 32, "num_attention_heads": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 2},
    "gpt_neox": ROPE,  # the head has another name in the file
    "gpt2": GPT,  # transposed layers
    "cohere": ROPE | {"use_qk_norm": True},  # norms with two dimensions
    "stablelm": ROPE | {"qk_layernorm": True, "num_attention_heads": 3, "hidden_size": 24, "num_key_value_heads": 3},
    "minicpm3": ROPE | LATENT | {"num_key_value_heads": 4},  # values shorter than keys
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24},
    "deepseek_v3": EXPERTS | LATENT | {"num_key_value_heads": 4}
    | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "sliding_window": 5},
    "jetmoe": {"hidden_size": 32, "intermediate_size": 24, "num_key_value_heads": 2, "kv_channels": 8}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"hidden_size": 32, "state_size": 4, "time_step_rank": 4},  # convolutions, A_log
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, families):
    return families(request.param, **FAMILIES[request.param])


@torch.no_grad()
def test_a_walk_gives_transformers_logits_and_the_plan_knows_each_layer(folder, ids):
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids, use_cache=False).logits
    assert expected.std() > 0.01
    original = opened(folder)
    assert torch.allclose(streamed_logits(original, ids), expected, rtol=1e-4, atol=1e-5)
    outline = MetaModel(AutoConfig.from_pretrained(folder), torch.float32, "cpu")
    for block, places in zip(blocks(original.load_all()), outline.places()):
        layers = linears(block)
        assert places and all(
            (one.out_features, one.in_features) == layers[name].weight.shape for name, one in places.items()
        )
        assert layers.keys() - places.keys() <= {"mixer.dt_proj"}  # of Mamba, which multiplies by its weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss", "jetmoe"])
def test_what_was_taken_apart_computes_the_same_and_goes_together_again(families, name, ids):
    model = AutoModelForCausalLM.from_pretrained(families(name, **FAMILIES[name]), dtype=torch.float32).eval()
    expected, state = model(ids, use_cache=False).logits, {key: one.clone() for key, one in model.state_dict().items()}
    parts = take_apart(model)
    assert parts and torch.allclose(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    again = together(model.state_dict(), parts)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert take_apart(model) == {}


def test_what_chooses_experts_is_no_layer_to_compress_and_no_norm(families):
    model = opened(families("jetmoe", **FAMILIES["jetmoe"])).model()
    routers = [name for name, module in model.named_modules() if isinstance(module, KeptLinear)]
    assert len(routers) == 6 and all("router" in name for name in routers)
    block = blocks(model)[1]
    assert {len(stack) for stack in stacks(block).values()} == {4}
    assert linears(block).keys() >= {layer for stack in stacks(block).values() for layer in stack}
    oss = opened(families("gpt_oss", **FAMILIES["gpt_oss"])).model()
    assert not any("router" in name for name in norms(oss))


@torch.no_grad()
def test_names_of_files_that_transformers_maps(families, ids, tmp_path):
    """A base model without prefix; a tied model whose file has the head alone."""
    tied = families("llama", tie_word_embeddings=True)
    expected = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32).eval()(ids).logits
    tensors = load_file(tied / "model.safetensors")
    bare = {name.removeprefix("model."): one for name, one in tensors.items()}
    head = {name: one for name, one in tensors.items() if name != "model.embed_tokens.weight"}
    head["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for name, changed in (("bare", bare), ("head", head)):
        folder = tmp_path / name
        folder.mkdir()
        for file in tied.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(streamed_logits(opened(folder), ids), expected), name


def test_a_model_with_nothing_to_compress_is_refused(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder, num_hidden_layers=0)
    with pytest.raises(InputError, match="LlamaForCausalLM: has no list of blocks, so there is nothing to compress"):
        MetaModel(config, torch.float32, "cpu")
