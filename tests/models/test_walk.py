"""The walk block by block against the model's own hidden states."""

import pytest
import torch
from conftest import FAMILIES
from reference.prices import by_autograd
from torch import nn
from transformers import AutoModelForCausalLM

from cluscomp.errors import InputError
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.models.walk import Walk
from cluscomp.score.perplexity import window_scores
from cluscomp.stages.prices import prices

TUPLES = {  # families whose blocks give tuples
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "hidden_size": 32, "window_size": 5}
    | {"attention_types": [[["global", "local", "global"], 1]]},
}


@pytest.fixture(params=[*FAMILIES, *TUPLES])
def model(request, families):
    family = families(request.param, **TUPLES.get(request.param, {}))
    return AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()


@torch.no_grad()
def test_hidden_states_are_the_models_own(model, ids):
    outputs = []
    handle = blocks(model)[-1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    expected = model(ids, output_hidden_states=True, use_cache=False)
    handle.remove()
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]  # transformers' own is after the final norm
    walk = Walk(model)
    hidden = walk.embed(ids)
    for index, truth in enumerate([*expected.hidden_states[:-1], last]):
        assert torch.equal(hidden, truth), f"entering block {index}"
        if index < len(walk):
            with walk.block(index) as block:
                hidden = walk.apply(index, block, hidden)
    assert torch.equal(walk.logits(hidden, ids), expected.logits)


@torch.no_grad()
def test_a_pass_for_what_enters_layers_ends_at_the_last_of_them(model, ids):
    walk, block = Walk(model), blocks(model)[0]
    hidden, layers = walk.embed(ids), linears(block)
    _, expected = walk.observe(0, block, hidden, [*layers])
    ran = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    in_order = [*expected]
    for number in range(1, len(in_order) + 1):
        asked = in_order[:number]
        found = walk.entering(0, block, hidden, asked)
        assert found.keys() == set(asked) and ran == asked[:-1]
        assert all(torch.equal(found[name], expected[name]) for name in asked)
        ran.clear()
    assert torch.equal(walk.apply(0, block, hidden), walk.observe(0, block, hidden, [])[0])


@torch.no_grad()
def test_windows_of_two_shapes_do_not_mix(model, ids):
    """The last batch of a data set is smaller: its masks are other ones."""
    walk = Walk(model)
    parts = [ids, ids[:1], ids[:, :7]]
    hidden = [walk.embed(part) for part in parts]
    for index, block in enumerate(walk.blocks):
        hidden = [walk.apply(index, block, states) for states in hidden]
    for states, part in zip(hidden, parts):
        assert torch.equal(walk.logits(states, part), model(part, use_cache=False).logits)


@torch.no_grad()
def test_the_model_is_as_before_after_a_walk(model, ids):
    before = model(ids).logits
    walk = Walk(model)
    walk.logits(walk.embed(ids), ids)
    assert torch.equal(model(ids).logits, before)
    assert not any(block._forward_hooks or "forward" in vars(block) for block in blocks(model))


@torch.no_grad()
def test_sliding_windows_are_shorter_than_the_test_windows(families, ids):
    """Or the tests above could not tell block 0's mask from the others'."""
    for name in ("mistral", "gemma2", "gemma3_text"):
        model = AutoModelForCausalLM.from_pretrained(families(name), dtype=torch.float32).eval()
        walk = Walk(model)
        hidden = walk.embed(ids)
        short = walk.apply(0, walk.blocks[0], hidden)
        model.config.sliding_window = 64
        whole = Walk(AutoModelForCausalLM.from_pretrained(families(name), config=model.config, dtype=torch.float32))
        whole.embed(ids)
        assert not torch.equal(whole.apply(0, whole.blocks[0], hidden)[:, 6:], short[:, 6:]), name
        assert torch.allclose(whole.apply(0, whole.blocks[0], hidden)[:, :4], short[:, :4], atol=1e-5), name


GEMMA3N = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": 4, "activation_sparsity_pattern": [0.0] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5,
    "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
}  # fmt: skip
STREAMS = {
    "gemma3n_text": GEMMA3N | {"num_kv_shared_layers": 0},  # several streams before the windows
    "deepseek_v4": {  # several behind them, and token ids for each block
        "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "q_lora_rank": 16, "o_lora_rank": 8,
        "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
        "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8,
    },
    "zaya": {  # what routers think is handed from block to block
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 1, "moe_intermediate_size": 24, "router_hidden_size": 16,
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", STREAMS)
def test_all_that_passes_from_block_to_block_is_walked(families, ids, name):
    model = AutoModelForCausalLM.from_pretrained(families(name, **STREAMS[name]), dtype=torch.float32).eval()
    walk = Walk(model)
    for windows in (ids, ids.flip(1), ids[:1]):
        [last] = walk.through([windows], "text")
        assert last.ndim == 3 and last.shape[2] > 32
        assert torch.allclose(walk.logits(last, windows), model(windows, use_cache=False).logits, atol=1e-5)


def test_a_layer_that_is_called_twice_is_seen_with_all_its_tokens(families, ids, tmp_path):
    """Zaya's delayed values are made of the hidden states, and then of a state of zeros, which none reaches."""
    original = Original(families("zaya", **STREAMS["zaya"]), torch.float32, torch.device("cpu"))
    walk = Walk(original.model(), original)
    hidden_BTH = walk.embed(ids)
    with walk.block(0) as block:
        (delayed,) = [name for name in linears(block) if name.endswith("v_proj_delayed")]
        query = delayed.replace("v_proj_delayed", "q_proj")
        _, entering = walk.observe(0, block, hidden_BTH, [delayed, query])
        assert entering[delayed] is entering[query] and entering[query].shape[:2] == ids.shape
    found = prices(walk, [ids], tmp_path)
    assert all(value >= 0 for value in found.values()) and found[f"{block_names(walk.model)[0]}.{query}"] > 0


@torch.no_grad()
def test_blocks_that_look_into_others_are_refused(families, ids):
    """Of Gemma 3n the last blocks may use the keys and values of earlier ones."""
    folder = families("gemma3n_text", **GEMMA3N, num_kv_shared_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with pytest.raises(InputError, match=r"cannot be walked.*layers\.2 gets other arguments"):
        Walk(model).embed(ids)


@torch.no_grad()
def test_arguments_that_change_with_the_tokens_are_found(tiny_folder, ids):
    """A Llama whose rotary embedding is scaled by what it is given, the embedded tokens: they are in a tuple."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    model.model.rotary_emb.register_forward_hook(lambda _, args, output: (output[0] * args[0].mean(), output[1]))
    with pytest.raises(InputError, match=r"argument position_embeddings is made of the tokens"):
        Walk(model).embed(ids)


@pytest.fixture(scope="session")
def gemma4(families):
    """A model that gives each block an embedding of the tokens of its own."""
    return families(
        "gemma4_text", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        global_head_dim=8, vocab_size_per_layer_input=257, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=5,
    )  # fmt: skip


@torch.no_grad()
def test_arguments_that_are_made_of_the_tokens_travel_with_the_hidden_states(gemma4, ids):
    model = AutoModelForCausalLM.from_pretrained(gemma4, dtype=torch.float32).eval()
    walk = Walk(model)
    for windows in (ids, ids.flip(1), ids[:1]):
        [last] = walk.through([windows], "text")
        assert last.shape[2] == 32 + 3 * 8 and walk.width == 32
        assert torch.allclose(walk.logits(last, windows), model(windows, use_cache=False).logits, atol=1e-5)


def test_what_travels_behind_the_hidden_states_has_no_price(gemma4, ids, tmp_path):
    original = Original(gemma4, torch.float32, torch.device("cpu"))
    found = prices(Walk(original.model(), original), [ids], tmp_path)
    assert found == pytest.approx(by_autograd(original.load_all(), ids), rel=1e-3)


def test_training_reaches_the_stored_parameters_through_apply(tiny_folder, ids):
    model = Original(tiny_folder, torch.float32, torch.device("cpu")).load_all()
    walk = Walk(model)
    hidden = walk.embed(ids)
    weight = walk.blocks[0].mlp.up_proj.weight.requires_grad_(True)
    walk.apply(0, walk.blocks[0], hidden).square().mean().backward()
    assert weight.grad is not None and weight.grad.any()


class Between(nn.ModuleList):
    """Blocks between which a model does something of its own."""

    def __getitem__(self, places):
        if isinstance(places, int):
            return super().__getitem__(places)
        return [lambda hidden, layer=layer, **more: self.between(layer, hidden, more) for layer in list(self)[places]]


@torch.no_grad()
@pytest.mark.parametrize(
    "between, reason",
    [
        (lambda layer, hidden, more: layer(2 * hidden, **more), "what enters model.layers.1 is not what the block"),
        (lambda layer, hidden, more: layer(layer(hidden, **more), **more), "not called one after the other"),
        (
            lambda layer, hidden, more: layer(
                hidden, **more | {"position_embeddings": [hidden[0, 0].mean() * p for p in more["position_embeddings"]]}
            ),
            "model.layers.1 gets other arguments",
        ),
    ],
)
def test_a_walk_that_is_not_the_models_own_pass_is_refused(tiny_folder, ids, between, reason):
    """Of the original, read block by block, and of a model in memory; what it says is known before any window."""
    original = Original(tiny_folder, torch.float32, torch.device("cpu"))
    for model, source in ((original.model(), original), (original.load_all(), None)):
        model.model.layers = Between(model.model.layers)
        model.model.layers.between = between
        with pytest.raises(InputError, match=f"its blocks cannot be walked one by one: .*{reason}"):
            Walk(model, source).embed(ids)
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks(model))


@torch.no_grad()
def test_another_head_after_skipped_blocks_is_refused(tiny_folder, ids):
    model = Original(tiny_folder, torch.float32, torch.device("cpu")).load_all()
    calls = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: calls.append(0) or output * len(calls))
    with pytest.raises(InputError, match="its logits are then others"):
        Walk(model).embed(ids)


@torch.no_grad()
def test_a_model_that_sees_what_it_is_to_predict_is_refused(tiny_folder, ids):
    model = Original(tiny_folder, torch.float32, torch.device("cpu")).load_all()
    for block in blocks(model):
        block.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, kwargs | {"attention_mask": torch.zeros(2, 1, 12, 12)}),
            with_kwargs=True,
        )
    with pytest.raises(InputError, match="LlamaForCausalLM is no causal language model"):
        Walk(model).embed(ids)


def test_an_original_is_compared_once_and_holds_one_block(families, ids):
    original = Original(families("gptj", **TUPLES["gptj"]), torch.float32, torch.device("cpu"))
    model, read = original.model(), []
    model.transformer.h[0].register_forward_hook(lambda *_: read.append(next(model.transformer.h[1].parameters())))
    Walk(model, original).embed(ids)
    assert [one.is_meta for one in read[:1]] == [True] and original.manner.gives == 2
    runs = len(read)
    Walk(model, original).embed(ids)
    assert len(read) == runs + 1  # the capture alone
    assert all(parameter.is_meta for block in blocks(model) for parameter in block.parameters())


@torch.no_grad()
def test_the_first_block_whose_numbers_are_none_is_named(tiny_folder, ids):
    original = Original(tiny_folder, torch.float32, torch.device("cpu"))
    for value, place in ((torch.nan, "model.layers.1"), (torch.inf, "model.layers.1"), (torch.nan, "the head")):
        model = original.load_all()
        norm = model.model.norm if place == "the head" else model.model.layers[1].input_layernorm
        norm.weight[3] = value
        with pytest.raises(InputError, match=f"^{place}.*: NaN or infinity"):
            window_scores(Walk(model), ids, batch_size=2, label="text")
    model = original.load_all()
    walk = Walk(model)
    walk.embed(ids)  # on this window there was nothing
    model.model.layers[2].mlp.down_proj.weight[0] = torch.inf
    with pytest.raises(InputError, match=r"^model\.layers\.2\.mlp\.down_proj\.weight: NaN or infinity"):
        walk.through([ids], "text")
    model.model.layers[2].mlp.down_proj.weight[0] = 3e38
    with pytest.raises(InputError, match=r"^model\.layers\.2: NaN or infinity in what it makes of the text"):
        walk.through([ids], "text")
