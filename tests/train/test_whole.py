"""Training of whole models of families that transformers builds otherwise than most."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROPE, TOKENS
from streamed import opened
from transformers import AutoModelForCausalLM

from cluscomp.models.predictions import Teacher
from cluscomp.models.walk import Walk
from cluscomp.train.whole import IGNORED, Objective

LLAMA4 = ROPE | {
    "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1],
}  # fmt: skip
GEMMA4 = ROPE | {
    "global_head_dim": 8, "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip


def of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def labelled(ids_BT):
    return {"input_ids": ids_BT, "labels": F.pad(ids_BT[:, 1:], (0, 1), value=IGNORED)}


def taught(folder, ids_BT, place):
    """The original's own predictions of windows, and what its blocks make of them."""
    original, teacher = opened(folder), Teacher(place, ids_BT, 300, hidden=True)
    teacher.write(Walk(original.model(), original), batch_size=2)
    return teacher


@torch.no_grad()
def test_a_model_that_names_its_parts_otherwise_is_scored_by_its_logits(families, ids):
    """Llama 4, of which transformers finds no part without the head."""
    model = of(families("llama4_text", **LLAMA4))
    objective = Objective(model, [], cross_entropy=1, kl=0, ids_BT=ids)
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(objective(**labelled(ids))["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_what_a_teacher_keeps_of_blocks_has_length_1_whatever_travels_behind(families, ids, tmp_path):
    """Gemma 4 gives each block an embedding of the tokens of its own, which is no part of a hidden state."""
    teacher = taught(families("gemma4_text", **GEMMA4), ids, tmp_path)
    hidden_TLH = teacher.window(0)["hidden"].float()
    assert hidden_TLH.shape == (TOKENS, 2, 32)
    torch.testing.assert_close(hidden_TLH.norm(dim=-1), torch.ones(TOKENS, 2), rtol=0, atol=2e-3)
