"""Training of whole models of families that transformers builds otherwise than most."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROPE, TOKENS
from streamed import opened
from transformers import AutoConfig, AutoModelForCausalLM

from cluscomp.errors import InputError
from cluscomp.models.original import block_names, blocks, norms
from cluscomp.models.predictions import Teacher
from cluscomp.models.sources import TinyModel
from cluscomp.models.walk import Walk
from cluscomp.plan.meta import MetaModel
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED, Objective
from cluscomp.train.on_text import WithHidden
from cluscomp.train.steps import Steps
from cluscomp.train.whole import _rematerialised_blocks, _training, train_whole

LLAMA4 = ROPE | {
    "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1],
}  # fmt: skip
GEMMA4 = ROPE | {
    "global_head_dim": 8, "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
STREAMS = {
    "llama": ROPE,
    "mamba": {"hidden_size": 32, "state_size": 4, "time_step_rank": 4},  # `hidden_states` begin after block 0
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64},
    "gemma3n_text": ROPE | {  # several streams
        "num_hidden_layers": 4, "activation_sparsity_pattern": [0.0] * 4, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5, "laurel_rank": 4,
        "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8,
    },
}  # fmt: skip
PROPHET = {
    "hidden_size": 32, "num_decoder_layers": 2, "num_encoder_layers": 1, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "is_decoder": True,
    "is_encoder_decoder": False,
}  # fmt: skip
ALL_KEPT = {
    "ctrl": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "dff": 48},
    "git": ROPE | {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        }
    },
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


@pytest.mark.parametrize("name", STREAMS)
def test_the_original_is_no_distance_from_what_its_own_blocks_give(families, ids, tmp_path, name):
    """And gradients of other models flow through them, the same bits where blocks run again in the backward pass."""
    folder = families(name, **STREAMS[name])
    teacher, model = taught(folder, ids, tmp_path), of(folder)
    rows = [teacher.window(number) for number in range(2)]
    batch = labelled(ids) | {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    weights = {"cross_entropy": 0, "kl": 1, "ids_BT": ids}
    with torch.no_grad():
        objectives = [WithHidden(model, [], hidden=hidden, **weights) for hidden in (0, 1e3)]
        plain, both = (float(one(**batch)["loss"]) for one in objectives)
    assert both == pytest.approx(plain, abs=1e-2)  # float16 times 1000; that of another block is far off
    first = blocks(model)[0]
    first.requires_grad_(True)
    batch["hidden"] = batch["hidden"].flip(1)
    gradients = []
    for during in (_training, _rematerialised_blocks):
        first.zero_grad()
        with during(model):
            objectives[1](**batch)["loss"].backward()
        gradients.append({key: one.grad for key, one in first.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(one, gradients[1][key]) and one.any() for key, one in gradients[0].items())
    assert not objectives[1]._between


def test_blocks_with_other_positions_than_tokens_are_no_teachers(ids, tmp_path):
    """ProphetNet predicts several tokens at once, each at positions of its own."""
    folder = TinyModel(architecture="prophetnet", config=PROPHET, seed=1).folder(tmp_path)
    with pytest.raises(InputError, match=r"ProphetNet.*36 positions for 12 tokens.*give recover\.hidden=0"):
        taught(folder, ids, tmp_path)


@pytest.mark.parametrize("name", ALL_KEPT)
def test_what_transformers_cannot_make_again_is_kept(families, ids, tmp_path, caplog, name):
    """CTRL has no gradient checkpointing; GIT's embeddings take no hook that asks for their gradient."""
    folder = families(name, **ALL_KEPT[name])
    found = []
    for again in (True, False):
        model, caplog.records[:] = of(folder), []
        trained = Trained(model, codebooks=False, others=norms(model))
        examples = [{key: value[0] for key, value in labelled(ids[:1]).items()}] * 4
        settings = Steps(
            batch_size=2, accumulation=1, lr=1e-3, weight_decay=0.0, schedule="constant", warmup=0.0, clip=1.0,
            save_every=2, gradient_checkpointing=again,
        )  # fmt: skip
        numbers = train_whole(
            model, trained, Objective(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=ids), examples,
            examples[:1], settings, tokens=48, name="whole", folder=tmp_path / str(again), seed=0,
        )  # fmt: skip
        assert numbers["kept"] and numbers["steps"] == 2
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert sum("has no gradient checkpointing: all" in line for line in told) == (again and name == "ctrl")
        found.append([parameter.detach().clone() for parameter in norms(model).values()])
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_the_plan_knows_of_which_models_all_is_kept(families):
    wanted = {"together": 1, "of_a_step": 1, "length": 8, "examples": 2, "held_out": 1, "logits": 64}
    for name, config in (ALL_KEPT | {"llama": ROPE}).items():
        outline = MetaModel(AutoConfig.from_pretrained(families(name, **config)), torch.float32, "cpu")
        costs = [outline.end_to_end(**wanted, trained=0.0, state=0.0, again=again) for again in (True, False)]
        assert (costs[0].device == costs[1].device) == (name == "ctrl")
        assert ["gradient_checkpointing=true" in one.relief for one in costs] == [False, name != "ctrl"]


@torch.no_grad()
def test_the_last_hidden_states_may_have_another_dtype_than_the_head(families, ids):
    """Mamba's are float32."""
    model = AutoModelForCausalLM.from_pretrained(families("mamba", **STREAMS["mamba"]), dtype=torch.bfloat16).eval()
    objective = Objective(model, [], cross_entropy=1, kl=0, ids_BT=ids)
    batch = labelled(ids)
    logits_BTV = model(ids, use_cache=False).logits.float()
    expected = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch["labels"][:, :-1].flatten())
    torch.testing.assert_close(objective(**batch)["loss"], expected, rtol=1e-2, atol=0)


def test_many_tokens_of_a_step_leave_gradients_in_float16(families, ids):
    """A step of 2^20 tokens: each gives a millionth of the loss, which float16 has no numbers for."""
    folder, found = families("llama"), {}
    for dtype in (torch.float32, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        name = f"{block_names(model)[0]}.mlp.down_proj.weight"
        trained = Trained(model, codebooks=False, others={name: model.get_parameter(name)})
        objective = Objective(model, trained.parameters, cross_entropy=1, kl=0, ids_BT=ids)
        trained.start()
        with objective.learning():
            loss = objective(**labelled(ids), num_items_in_batch=2**20)["loss"]
            loss.backward()
        found[dtype] = trained.parameters[0].grad.double().flatten(), loss.double()
    (expected, loss), (gradient, also) = found.values()
    assert F.cosine_similarity(expected, gradient, dim=0) > 0.999
    torch.testing.assert_close(gradient.norm(), expected.norm(), rtol=0.01, atol=0)
    torch.testing.assert_close(also, loss, rtol=0.01, atol=0)
