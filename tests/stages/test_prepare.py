"""Stage prepare: CrAM and Quant-Noise against their rules written out, plain training, resumption, what is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pipelines import composed, pipeline
from pydantic import ValidationError

from cluscomp.errors import InputError
from cluscomp.forms.codebook import sub_vectors
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.stages import Job
from cluscomp.stages.prepare import Prepare
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED
from cluscomp.train.preparing import Clusters, Cram, Prepared, QuantNoise
from cluscomp.train.whole import _rematerialised_blocks

CPU = torch.device("cpu")
SETTINGS = {
    "tokens": 4 * 4 * 12, "length": 12, "held_out": 4, "batch_size": 4, "accumulation": 1, "lr": 1e-3,
    "weight_decay": 0.1, "schedule": "cosine", "warmup": 0.0, "clip": 1.0, "save_every": 2, "rule": "plain",
    "gradient_checkpointing": True,
    "rho": 0.05, "plus": False, "noise": 0.3, "compression": "codebooks", "vector_dim": 4, "codebook_size": 16,
    "iterations": 3, "refresh": 2,
}  # fmt: skip


def stage(text, **changed) -> Prepare:
    return Prepare(data=text, **SETTINGS | changed)


def run(prepare: Prepare, original: Original, folder):
    model = original.model()
    found = prepare.run(model, Job(folder, 0, original))
    return {name: weight.clone() for name, weight in model.state_dict().items()}, found


class Dense:
    """A dense model ready to be trained, its layers and what a rule needs of them."""

    def __init__(self, folder, dtype=torch.float32):
        self.model = Original(folder, dtype, CPU).load_all()
        self.model.requires_grad_(False)
        self.layers = {
            f"{name}.{layer}": linear
            for name, block in zip(block_names(self.model), blocks(self.model))
            for layer, linear in linears(block).items()
        }
        self.trained = Trained(
            self.model, codebooks=False, others={f"{name}.weight": layer.weight for name, layer in self.layers.items()}
        )
        self.trained.start()

    def gradients(self, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the next token's cross-entropy, at the weights as they are, by plain transformers; of those it reaches."""
        logits_BTV = self.model(ids_BT, use_cache=False).logits
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        found = torch.autograd.grad(loss, [layer.weight for layer in self.layers.values()], allow_unused=True)
        return {name: gradient for name, gradient in zip(self.layers, found) if gradient is not None}

    def by(self, kind, ids_BT: torch.Tensor, **rule) -> tuple[Prepared, dict[str, torch.Tensor]]:
        """The gradients that a rule leaves after a step's first batch, blocks made again in the backward pass."""
        objective = kind(self.model, self.trained, self.layers, ids_BT, **rule)
        objective.begin(0)
        with objective.installed(), _rematerialised_blocks(self.model):
            objective(input_ids=ids_BT, labels=F.pad(ids_BT[:, 1:], (0, 1), value=-100))["loss"].backward()
        found = {
            name: layer.weight.grad.clone() for name, layer in self.layers.items() if layer.weight.grad is not None
        }
        self.model.zero_grad()
        return objective, found


def clusters() -> Clusters:
    return Clusters(vector_dim=4, codebook_size=16, iterations=3, refresh=2, seed=0)


def mean_of(found: Clusters, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
    """By hand: each sub-vector becomes the mean of those with its code."""
    points_ND = sub_vectors(weight_OI, 4, "out")
    means_ND = torch.stack([points_ND[found._codes[name] == code].mean(0) for code in found._codes[name]])
    return means_ND.view(weight_OI.shape[1], -1).T


def close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_crams_gradient_is_that_at_the_compressed_weights_a_step_ahead_averaged_in_clusters(families, ids):
    dense = Dense(families("llama"))
    before = {name: layer.weight.detach().clone() for name, layer in dense.layers.items()}
    first = dense.gradients(ids)
    rule = {"rho": 3.0, "plus": False, "clusters": clusters()}
    objective, found = dense.by(Cram, ids, **rule)
    _, with_plain = dense.by(Cram, ids, **rule | {"plus": True})
    _, sharp = dense.by(Cram, ids, rho=3.0, plus=False, clusters=None)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in dense.layers.items())
    for name, layer in dense.layers.items():
        layer.weight.data = before[name] + 3.0 * first[name]
    close(sharp, dense.gradients(ids))
    for name, layer in dense.layers.items():
        layer.weight.data = mean_of(objective.clusters, name, before[name] + 3.0 * first[name])
    expected = {name: mean_of(objective.clusters, name, g) for name, g in dense.gradients(ids).items()}
    close(found, expected)
    close(with_plain, {name: expected[name] + first[name] for name in expected})
    assert any((found[name] - first[name]).abs().max() > 1e-2 for name in first)


def test_cram_looks_as_far_ahead_from_a_part_of_a_step_as_from_a_whole_one(families, ids):
    """A step of two batches, of 11 and 6 labels: each looks ahead by its own mean loss, and counts by its labels."""
    dense = Dense(families("llama"))
    before = {name: layer.weight.detach().clone() for name, layer in dense.layers.items()}
    batches = [ids[:1], ids[1:, :7]]
    for plus in (False, True):
        objective = Cram(dense.model, dense.trained, dense.layers, ids, rho=3.0, plus=plus, clusters=None)
        expected = {name: torch.zeros_like(weight) for name, weight in before.items()}
        for ids_BT in batches:
            labels_BT, count = F.pad(ids_BT[:, 1:], (0, 1), value=-100), ids_BT.shape[1] - 1
            with objective.installed():
                objective(ids_BT, labels_BT, num_items_in_batch=torch.tensor(17))["loss"].backward()
            first = dense.gradients(ids_BT)
            for name, layer in dense.layers.items():
                layer.weight.data = before[name] + 3.0 * first[name]
            for name, gradient in dense.gradients(ids_BT).items():
                expected[name] += count / 17 * (gradient + plus * first[name])
                dense.layers[name].weight.data = before[name]
        close({name: layer.weight.grad for name, layer in dense.layers.items()}, expected)
        dense.model.zero_grad()


def test_cram_moves_no_expert_that_gets_no_token_and_adds_nothing_to_it(families, text, ids, tmp_path):
    folder = families(
        "qwen3_moe", hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
        moe_intermediate_size=16, num_experts=8, num_experts_per_tok=1,
    )  # fmt: skip
    dense = Dense(folder)
    first = dense.gradients(ids[:1])
    assert 0 < len(dense.layers.keys() - first.keys()) < 2 * 2 * 8  # some of the experts' layers get no token
    before = {name: layer.weight.detach().clone() for name, layer in dense.layers.items()}
    _, found = dense.by(Cram, ids[:1], rho=0.5, plus=True, clusters=None)
    for name, gradient in first.items():
        dense.layers[name].weight.data = before[name] + 0.5 * gradient
    ahead = dense.gradients(ids[:1])
    assert found.keys() == first.keys() | ahead.keys()
    close(found, {name: sum(one[name] for one in (first, ahead) if name in one) for name in found})
    _, told = run(
        stage(text, rule="cram", plus=True, batch_size=1, tokens=4 * 12, vector_dim=4, codebook_size=8),
        Original(folder, torch.float32, CPU),
        tmp_path,
    )
    assert told["steps"] == 4 and told["kept"]


def test_noise_leaves_weights_as_they_are_takes_its_share_and_lets_gradients_straight_through(families, ids):
    dense = Dense(families("llama", intermediate_size=512))
    before = {name: layer.weight.detach().clone() for name, layer in dense.layers.items()}
    objective, found = dense.by(QuantNoise, ids, share=0.3, clusters=clusters())
    assert all(torch.equal(layer.weight, before[name]) for name, layer in dense.layers.items())
    drawn = torch.cat([objective.noised[name] for name in dense.layers])
    assert float(drawn.float().mean()) == pytest.approx(0.3, abs=0.01)
    for name, layer in dense.layers.items():
        noised = objective.noised[name][:, None].expand(-1, 4).reshape(before[name].shape[1], -1).T
        layer.weight.data = torch.where(noised, mean_of(objective.clusters, name, before[name]), before[name])
    close(found, dense.gradients(ids))
    for name, layer in dense.layers.items():
        layer.weight.data = before[name]
    with torch.no_grad(), objective.installed():  # scored without noise
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        plain = Prepared(dense.model, dense.trained, dense.layers, ids)
        assert objective(input_ids=ids, labels=labels)["loss"] == plain(input_ids=ids, labels=labels)["loss"]


def test_cram_that_changes_nothing_is_adamw_step_for_step(tiny_folder, text, tmp_path):
    """Without a step ahead or compression: the same losses and weights, by twice the passes."""
    original = Original(tiny_folder, torch.float32, CPU)
    plain, found = run(stage(text), original, tmp_path / "plain")
    same, cram = run(stage(text, rule="cram", rho=0.0, compression="none"), original, tmp_path / "cram")
    assert found["kept"] and found["attempts"] == cram["attempts"]
    assert (found["passes"], cram["passes"]) == (4, 8)
    assert all(torch.equal(weight, same[name]) for name, weight in plain.items())
    changed = {
        name for name, weight in original.load_all().state_dict().items() if not torch.equal(weight, plain[name])
    }
    assert changed == {f"{name}.weight" for name in Dense(tiny_folder).layers}


@pytest.mark.parametrize("rule", ["cram", "quant_noise"])
def test_a_run_that_goes_on_ends_with_the_same_bits_and_rules_differ(tiny_folder, text, tmp_path, rule):
    original = Original(tiny_folder, torch.float32, CPU)
    whole, found = run(stage(text, rule=rule), original, tmp_path)
    (last,) = tmp_path.glob("training/attempt-0/checkpoint-4")
    shutil.rmtree(last)
    (tmp_path / "training" / "attempts.json").unlink(missing_ok=True)
    again, refound = run(stage(text, rule=rule), original, tmp_path)
    assert refound == found and all(torch.equal(weight, again[name]) for name, weight in whole.items())
    plain, _ = run(stage(text), original, tmp_path / "plain")
    assert any(not torch.equal(weight, plain[name]) for name, weight in whole.items())


def test_in_bfloat16_masters_learn_and_16_bits_are_left(tiny_folder, text, tmp_path):
    original = Original(tiny_folder, torch.bfloat16, CPU)
    before = original.load_all().state_dict()
    for rule in ("cram", "quant_noise"):
        after, found = run(stage(text, rule=rule, tokens=2 * 4 * 12), original, tmp_path / rule)
        assert found["kept"] and {weight.dtype for weight in after.values()} == {torch.bfloat16}
        assert sum(not torch.equal(weight, before[name]) for name, weight in after.items()) == 3 * 7


@pytest.mark.parametrize("plus", [False, True])
def test_in_float16_a_step_of_many_tokens_leaves_gradients(tiny_folder, ids, plus):
    """Of 2^20 tokens, each of which gives a millionth of the loss; so does the gradient that CrAM looks ahead by."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        dense = Dense(tiny_folder, dtype)
        cram = Cram(dense.model, dense.trained, dense.layers, ids, rho=0.05, plus=plus, clusters=None)
        batch = {"input_ids": ids, "labels": F.pad(ids[:, 1:], (0, 1), value=IGNORED)}
        with cram.installed(), cram.learning():
            cram(**batch, num_items_in_batch=2**20)["loss"].backward()
        found[dtype] = [
            torch.cat([one.double().flatten() for one in gradients])
            for gradients in ([weight.grad for weight in dense.trained.parameters], cram._gradients.values())
        ]
    for expected, gradient in zip(*found.values()):
        assert F.cosine_similarity(expected, gradient, dim=0) > 0.999
        torch.testing.assert_close(gradient.norm(), expected.norm(), rtol=0.01, atol=0)


def test_a_step_ahead_is_not_rounded_away_in_bfloat16():
    """Weights of 1 and a step of a thousandth, below half a step of bfloat16."""
    cram = Cram.__new__(Cram)
    gradient_OI = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    cram.rho, cram.clusters, cram._to_mean, cram._gradients = 1e-3, None, 1.0, {"layer": gradient_OI}
    ahead_OI = cram._compressed("layer", torch.ones(16, 32, dtype=torch.bfloat16))
    torch.testing.assert_close(ahead_OI - 1, 1e-3 * gradient_OI, rtol=1e-3, atol=1e-6)
    linear = torch.nn.Linear(32, 16, dtype=torch.bfloat16)
    cram.at = cram._compressed
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    assert cram._product("layer", linear, x).dtype == torch.bfloat16


def test_the_prepared_model_is_compressed_next_and_planned(ground, tmp_path):
    arguments = [
        "model=tiny", "data=text", f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", "method=rtn",
        f"outputs={tmp_path}", "bits=3", "order=[prepare,cluster]", "prepare=quick", "prepare.tokens=1024",
        "prepare.length=32", "prepare.held_out=4", "prepare.codebook_size=16", "prepare.lr=1e-3",
        "evaluate.context=32", "evaluate.limit=4",
    ]  # fmt: skip
    experiment = composed(*arguments)
    record = pipeline(*arguments).record
    assert record.stages["prepare"]["found"]["passes"] == 2 * 1024 // 32 // 4
    assert record.stages["prepare"]["size"]["model_bits_per_weight"] == 32  # as in the original's file
    scores = {score.after: score.value for score in record.scores if score.metric == "perplexity"}
    assert scores["prepare"] < scores["original"]
    idle = experiment.stages["prepare"].without_effect()
    assert idle == {"save_every", "gradient_checkpointing", "noise"}
    assert replace(experiment.stages["prepare"], rule="plain").without_effect() >= {"rho", "codebook_size", "noise"}


def test_what_cannot_be_is_refused_before_any_work(tiny_folder, text):
    original = Original(tiny_folder, torch.float32, CPU)
    with pytest.raises(ValidationError, match="rule=quant_noise needs compression=codebooks"):
        stage(text, rule="quant_noise", compression="none")
    with pytest.raises(ValidationError, match="save_every=3 is no multiple of refresh=2"):
        stage(text, rule="cram", save_every=3)
    with pytest.raises(ValidationError, match="tokens=5 do not make one step"):
        stage(text, tokens=5)
    with pytest.raises(
        InputError, match=r"layers\.0\.self_attn\.q_proj: prepare\.codebook_size=512 is more than its 256"
    ):
        stage(text, rule="cram", codebook_size=512).check(original)
    with pytest.raises(InputError, match=r"k_proj: prepare\.vector_dim 32 is outside 1 to 16"):
        stage(text, rule="cram", vector_dim=32).check(original)
    stage(text, codebook_size=512).check(original)  # plain training looks at no codes
