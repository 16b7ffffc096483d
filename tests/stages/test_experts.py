"""Stages on a mixture of experts: each expert's matrix is a layer, with statistics of the tokens routed to it."""

import math

import pytest
import torch
from pipelines import composed, pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

import cluscomp.checkpoint  # noqa: F401
from cluscomp.data.texts import test_windows as windows_of
from cluscomp.forms.apart import stacks
from cluscomp.forms.linear import compressed
from cluscomp.models.original import Original, blocks, linears
from cluscomp.models.walk import Walk
from cluscomp.solve.layer import Later, Seen
from cluscomp.stages.observing import LEAST, in_turn, observe

MIXTRAL = {
    "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
}  # fmt: skip
SHORT = [
    "model=hub", "bits=3", "order=[cluster,block_finetune]", "method=gptvq", "block_finetune=quick", "data=text",
    "cluster.length=32", "cluster.samples=4", "cluster.batch_size=2",
    "block_finetune.length=32", "block_finetune.samples=2", "block_finetune.batch_size=1", "block_finetune.epochs=1",
    "evaluate.context=32", "evaluate.limit=2", "device=cpu",
]  # fmt: skip
GATED = "cluster=by_loss", "allocation=gates", "allocation.levels=2", "allocation.steps=2"

FAMILIES = {
    "mixtral": MIXTRAL,
    "qwen3_moe": MIXTRAL | {"num_experts": 4, "moe_intermediate_size": 24},
    "deepseek_v3": MIXTRAL | {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": MIXTRAL | {"sliding_window": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(families):
    return families("mixtral", **MIXTRAL)


def told(folder, ground, *more) -> list[str]:
    """The settings of a short run on a model's folder."""
    return [*SHORT, f"model.id='{folder}'", f"data.file='{ground}/text.txt'", *more]


@pytest.fixture(scope="module")
def finished(mixtral, ground):
    return pipeline(*told(mixtral, ground, *GATED, f"outputs='{ground}/outputs'"))


def test_experts_are_compressed_trained_and_loaded_with_equal_logits(finished):
    scores = {score.after: score.value for score in finished.record.scores if score.metric == "perplexity"}
    model = AutoModelForCausalLM.from_pretrained(finished.checkpoint, dtype=torch.float32).eval()
    names = compressed(model).keys()
    assert sum(".experts." in name for name in names) == 2 * 2 * 4 and not any("gate." in name for name in names)
    assert len(scores) == 3 and scores["block_finetune"] != scores["cluster"]
    walk = Walk(model)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        [last] = walk.through([ids], "text")
        assert torch.allclose(walk.logits(last, ids), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_tokens_of_each_expert_stand_in_the_record(finished):
    found = finished.record.stages["cluster"]["found"]["tokens_by_expert"]
    assert set(found) == {
        f"model.layers.{block}.mlp.experts.{stack}" for block in range(2) for stack in ("gate_up_proj", "down_proj")
    }
    assert all(sum(tokens) == 4 * 32 * 2 for tokens in found.values())  # two experts a token


@torch.no_grad()
def test_few_tokens_are_mixed_with_those_of_all_experts_and_none_count_as_no_data(mixtral):
    model = Original(mixtral, torch.float32, torch.device("cpu")).load_all()
    router = blocks(model)[0].mlp.gate
    router.weight[3] = 0
    router.weight[3] -= 100 * router.weight[:3].abs().sum(0)  # hardly ever chosen
    walk = Walk(model)
    ids = torch.arange(1, 201).view(4, 50)
    entering = walk.embed(ids)
    block = blocks(model)[0]
    layers = [layer for stack in stacks(block).values() for layer in stack]
    _, inputs = walk.observe(0, block, entering, layers)
    _, found = observe(frozenset({"moment"}), walk, 0, [entering], layers=layers)
    for stack in stacks(block).values():
        moments = [inputs[one].T @ inputs[one] if one in inputs else None for one in stack]
        tokens = [len(inputs.get(one, [])) for one in stack]
        assert [found[one].own for one in stack] == tokens
        mean = sum(one for one in moments if one is not None) / sum(tokens)
        for layer, moment, own in zip(stack, moments, tokens):
            expected = torch.eye(found[layer].matrix_II.shape[0])
            if own:
                expected = (moment + max(0, LEAST - own) * mean) / max(LEAST, own)
            assert torch.allclose(found[layer].matrix_II, expected, rtol=1e-4, atol=1e-6)
        assert any(0 < one < LEAST for one in tokens)


def test_without_a_token_a_statistic_is_that_of_no_data():
    seen = Seen(["moment", "diagonal", "magnitude"]).filled(Seen(["moment"]), 8, 3, torch.device("cpu"))
    assert torch.equal(seen.matrix_II, torch.eye(3))
    assert torch.equal(seen.diagonal_I, torch.ones(3)) and torch.equal(seen.magnitude_I, torch.ones(3))
    assert seen.own == 0


@torch.no_grad()
def perplexity(folder, text) -> float:
    """By plain transformers, of the windows that a run scores."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(windows_of(text, AutoTokenizer.from_pretrained(folder), length=32, limit=2))
    logits = model(ids, use_cache=False).logits[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


CLUSTER = "order=[cluster]", "method=gptq", "cluster=default", "bits=4"
IN_TURN = "cluster.statistics=1e-6"  # those of one expert are in memory at a time


@pytest.fixture(scope="module")
def clustered(families, ground):
    """The finished run of each family, by name."""
    made = {}

    def run(name):
        if name not in made:
            outputs = f"outputs='{ground}/{name}'"
            made[name] = pipeline(*told(families(name, **FAMILIES[name]), ground, *CLUSTER, IN_TURN, outputs))
        return made[name]

    return run


def score_of(found, after) -> float:
    return next(one.value for one in found.record.scores if (one.after, one.metric) == (after, "perplexity"))


@pytest.mark.parametrize("name", FAMILIES)
def test_perplexity_is_transformers_own_before_and_after(families, clustered, ground, name):
    found, folder = clustered(name), families(name, **FAMILIES[name])
    text = composed(*told(folder, ground)).stages["cluster"].data.text("test")
    assert score_of(found, "original") == pytest.approx(perplexity(folder, text), rel=1e-4)
    assert score_of(found, "cluster") == pytest.approx(perplexity(found.checkpoint, text), rel=1e-4)
    assert score_of(found, "cluster") != score_of(found, "original")


@torch.no_grad()
def test_statistics_are_the_same_bits_all_at_once_and_in_turn(mixtral, ids):
    model = Original(mixtral, torch.float32, torch.device("cpu")).load_all()
    walk, block = Walk(model), blocks(model)[0]
    entering = [walk.embed(ids), walk.embed(ids.flip(1))]
    layers = [*linears(block)]
    sizes = {layer: block.get_submodule(layer).in_features for stack in stacks(block).values() for layer in stack}
    room = 3 * 4 * 32**2  # three experts' of 32 inputs
    turns = in_turn(sizes, frozenset({"moment"}), room)
    assert [len(turn) for turn in turns] == [3, 4, 1] and [layer for turn in turns for layer in turn] == [*sizes]
    (stream, whole), (again, parts) = (
        observe(frozenset({"moment"}), walk, 0, entering, layers=layers, room=most) for most in (math.inf, room)
    )
    assert all(map(torch.equal, stream, again)) and whole.keys() == parts.keys() == set(layers)
    for layer in [*layers, *reversed(layers)]:
        assert torch.equal(whole[layer].matrix_II, parts[layer].matrix_II)
        assert whole[layer].own == parts[layer].own and isinstance(parts[layer], Later) == (layer in sizes)


def test_experts_take_turns_where_weights_follow_what_is_before_them(mixtral, ground, tmp_path):
    short = "order=[cluster]", "method=gptq", "cluster=corrected", "bits=4", "evaluate.after=[]"
    first, second = (
        pipeline(*told(mixtral, ground, *short, f"outputs='{tmp_path}/{number}'", *more)).record.stages["cluster"]
        for number, more in enumerate(([], [IN_TURN]))
    )
    assert first["found"] == second["found"] and first["checkpoint_hash"] == second["checkpoint_hash"]


KILLED = """
import os, signal
from cluscomp.__main__ import main
from cluscomp.stages import clustering

put_in, done = clustering.put_in, []

def put(block, layer, stored):
    done.append(layer)
    if done.count("mlp.experts.down_proj.1") == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    put_in(block, layer, stored)

clustering.put_in = put
main()
"""


def test_killed_amid_the_experts_of_a_block_a_run_ends_with_the_same_bits(mixtral, clustered, ground, forks, tmp_path):
    """As those of a run that was not killed, and in which experts took turns."""
    command = told(mixtral, ground, *CLUSTER, f"outputs='{tmp_path}'", "evaluate.after=[]")
    pid = forks.start(tmp_path / "log", *command, script=KILLED)
    assert forks.wait(pid) == -9
    assert [path.name for path in tmp_path.glob("cluster-*/block-*")] == ["block-000.safetensors"]
    again, whole = (found.record.stages["cluster"] for found in (pipeline(*command), clustered("mixtral")))
    assert again["checkpoint_hash"] == whole["checkpoint_hash"] and again["found"] == whole["found"]


def test_experts_that_share_a_codebook_count_it_once(mixtral, ground, tmp_path):
    short = (
        "order=[cluster]",
        "method=cluscomp",
        "method.iterations=3",
        "method.share=experts",
        "evaluate.after=[cluster]",
        "cluster=default",
    )
    found = pipeline(*told(mixtral, ground, *short, f"outputs='{tmp_path}'"))
    model = AutoModelForCausalLM.from_pretrained(found.checkpoint, dtype=torch.float32).eval()
    forms = {name: layer.stored for name, layer in compressed(model).items()}
    for block in (0, 1):
        for stack in ("gate_up_proj", "down_proj"):
            of_stack = [forms[f"model.layers.{block}.mlp.experts.{stack}.{expert}"] for expert in range(4)]
            assert len({one.codebooks.data_ptr() for one in of_stack}) == 1
            assert len({float(one.scales) for one in of_stack}) == 4
    assert len({one.codebooks.data_ptr() for one in forms.values()}) == 2 * (4 + 2)
    size = found.record.stages["cluster"]["size"]
    assert size["linear_bits_per_weight"] <= 3
    text = composed(*told(mixtral, ground)).stages["cluster"].data.text("test")
    assert score_of(found, "cluster") == pytest.approx(perplexity(found.checkpoint, text), rel=1e-4)
