"""Training of whole models of families that transformers builds otherwise than most."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROPE
from transformers import AutoModelForCausalLM

from cluscomp.train.whole import IGNORED, Objective

LLAMA4 = ROPE | {
    "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1],
}  # fmt: skip


def of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def labelled(ids_BT):
    return {"input_ids": ids_BT, "labels": F.pad(ids_BT[:, 1:], (0, 1), value=IGNORED)}


@torch.no_grad()
def test_a_model_that_names_its_parts_otherwise_is_scored_by_its_logits(families, ids):
    """Llama 4, of which transformers finds no part without the head."""
    model = of(families("llama4_text", **LLAMA4))
    objective = Objective(model, [], cross_entropy=1, kl=0, ids_BT=ids)
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(objective(**labelled(ids))["loss"]) == pytest.approx(float(expected), rel=1e-6)
