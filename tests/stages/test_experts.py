"""Stages on a mixture of experts: each expert's matrix is a layer, with statistics of the tokens routed to it."""

import pytest
import torch
from pipelines import pipeline
from transformers import AutoModelForCausalLM

import cluscomp.checkpoint  # noqa: F401
from cluscomp.forms.apart import stacks
from cluscomp.forms.linear import compressed
from cluscomp.models.original import Original, blocks
from cluscomp.models.walk import Walk
from cluscomp.solve.layer import Seen
from cluscomp.stages.observing import LEAST, observe

MIXTRAL = {
    "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
}  # fmt: skip
SHORT = [
    "model=hub", "bits=3", "order=[cluster,block_finetune]", "method=gptvq", "block_finetune=quick", "data=text",
    "cluster=by_loss", "allocation=gates", "allocation.levels=2", "allocation.steps=2",
    "cluster.length=32", "cluster.samples=4", "cluster.batch_size=2",
    "block_finetune.length=32", "block_finetune.samples=2", "block_finetune.batch_size=1", "block_finetune.epochs=1",
    "evaluate.context=32", "evaluate.limit=2", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(families):
    return families("mixtral", **MIXTRAL)


@pytest.fixture(scope="module")
def finished(mixtral, ground):
    places = f"model.id='{mixtral}'", f"outputs='{ground}/outputs'", f"data.file='{ground}/text.txt'"
    return pipeline(*SHORT, *places)


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
