"""Stages rank and cut: masks against their rule written out, sizes from one training, resumption, what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pipelines import composed, pipeline
from pydantic import ValidationError

from cluscomp import checkpoint
from cluscomp.data.files import FileText
from cluscomp.errors import InputError
from cluscomp.forms.layers import size_of
from cluscomp.forms.linear import compressed
from cluscomp.forms.low_rank import LowRank
from cluscomp.forms.plain import PlainWeight
from cluscomp.forms.ranked import Ranked
from cluscomp.models.original import Original
from cluscomp.report.names import limit, method_name
from cluscomp.runs.preparation import planned
from cluscomp.solve import low_rank
from cluscomp.stages import Job
from cluscomp.stages.cut import Cut
from cluscomp.stages.rank import Rank
from cluscomp.store.tensor_files import tensor_bytes
from cluscomp.train.masters import Trained
from cluscomp.train.objective import IGNORED
from cluscomp.train.ranking import Directions, Ranking

CPU = torch.device("cpu")
SETTINGS = {
    "tokens": 8 * 4 * 12, "length": 12, "held_out": 4, "batch_size": 4, "accumulation": 1, "lr": 5e-3,
    "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0, "clip": 1.0, "save_every": 4, "rule": "masks",
    "gradient_checkpointing": True,
    "until": 0.75, "price": 0.3, "rise": 1.1, "start": 0.005, "adapter_rank": 4, "alpha": 8.0,
}  # fmt: skip
CUT = {"ratio": 0.5, "method": None, "samples": 4, "length": 12, "batch_size": 2}


def stage(text, **changed) -> Rank:
    return Rank(data=text, **SETTINGS | changed)


def cut(text, **changed) -> Cut:
    return Cut(data=text, **CUT | changed)


def run(rank: Rank, original: Original, folder):
    model = original.model()
    return model, rank.run(model, Job(folder, 0, original))


def example(ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids_BT, "labels": F.pad(ids_BT[:, 1:], (0, 1), value=IGNORED)}


@pytest.fixture(scope="module")
def original(tiny_folder) -> Original:
    return Original(tiny_folder, torch.float32, CPU)


@pytest.fixture
def learning(original, text, tmp_path, ids):
    """A model whose directions learn, at their first step, and what they learn by."""
    model, found = run(stage(text, rule="values"), original, tmp_path)
    assert found == {"tokens": 0}
    layers = {}
    for name, weight_OI in original.tensors([f"{name}.weight" for name in compressed(model)]):
        layer = compressed(model)[name.removesuffix(".weight")]
        parts = low_rank.directions(weight_OI, None)
        layer.stored = Directions(
            parts.left_OR.float(), parts.right_RI.float(), layer.stored, start=0.02, rank=4, alpha=8.0, seed=0
        )
        layers[name.removesuffix(".weight")] = layer.stored
    trained = Trained(model, codebooks=True, others={})
    objective = Ranking(model, trained, layers, ids, price=0.1, rise=2.0, until=0.6)
    trained.start()
    objective.begin(0)
    yield model, layers, objective
    trained.restore()


def test_with_all_masks_open_it_is_the_original(learning, original, ids):
    model, layers, _ = learning
    logits_BTV = original.load_all()(ids).logits
    torch.testing.assert_close(model(ids).logits, logits_BTV, rtol=1e-4, atol=1e-4)
    for one in layers.values():
        one.restore({})
    torch.testing.assert_close(model(ids).logits, logits_BTV, rtol=1e-2, atol=1e-2)  # as stored, in 16 bits
    assert {type(one.stored) for one in layers.values()} == {Ranked}


def test_the_largest_seed_trains(original, text, tmp_path):
    model = original.model()
    job = Job(tmp_path, 2**64 - 1, original)
    assert stage(text, tokens=4 * 12).run(model, job)["steps"] == 1


def test_a_closed_mask_leaves_its_direction_out_and_gradients_pass_straight_through(learning):
    _, layers, _ = learning
    one = next(iter(layers.values()))
    left_OR, right_RI = (factor.detach() for factor in one.factors())
    one.mask.data[::2] = -0.01
    dense_OI = one.dense()
    torch.testing.assert_close(dense_OI.detach(), left_OR[:, 1::2] @ right_RI[1::2])
    gradient_OI = torch.randn(dense_OI.shape, generator=torch.Generator().manual_seed(0))
    (found_R,) = torch.autograd.grad(dense_OI, one.mask, gradient_OI)
    expected_R = torch.einsum("or,oi,ri->r", left_OR, gradient_OI, right_RI) / 0.02
    expected_R[::2] = 0
    torch.testing.assert_close(found_R, expected_R, rtol=1e-4, atol=1e-5)


def test_the_price_is_that_of_what_is_there_and_rises_until_the_size_is_reached(learning, ids):
    _, layers, objective = learning
    masks = torch.cat([one.mask.detach() for one in layers.values()])
    plain = torch.tensor(0.0)
    for step, price in ((0, 0.1), (1, 0.2), (2, 0.4)):
        objective.begin(step)
        with_price = objective(**example(ids))["loss"].detach()
        objective._now = 0.0
        plain = objective(**example(ids))["loss"].detach()
        assert float(with_price - plain) == pytest.approx(price * float(masks.sum()), rel=1e-3)
    objective.begin(2)
    halves = [objective(**example(one), num_items_in_batch=2 * 11)["loss"].detach() for one in ids.split(1)]
    assert float(sum(halves)) == pytest.approx(float(plain) + 0.4 * float(masks.sum()), rel=1e-4)
    for one in layers.values():
        one.mask.data[len(one.mask) // 4 :] = -1.0
    objective.begin(3)
    assert objective.reached() and objective._now == 0.0
    before = objective.scores.clone()
    for one in layers.values():
        one.mask.data += 0.5  # what an optimizer's momentum may do
    objective.begin(4)
    assert torch.equal(objective.scores, before)
    assert all(torch.equal(one.mask.data, one.scores) for one in layers.values())


def test_what_leaves_first_scores_lowest(learning):
    _, layers, objective = learning
    one = next(iter(layers.values()))
    assert torch.equal(one.scores, one.stored.scores) and bool((one.scores.diff() <= 0).all())  # singular values
    for step, (gone, there) in enumerate([(7, 0.02), (3, 0.015), (5, 0.01)], 1):
        one.mask.data[one.mask.data > 0] = there
        one.mask.data[gone] = -0.001
        objective.begin(step)
    assert one.scores[[7, 3, 5, 0]].tolist() == pytest.approx([-3, -2, -1, 0.01])


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5, 0.2])
def test_the_lowest_scores_of_all_go_first_and_the_size_is_just_met(ratio):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (64, 48), "b": (48, 96), "c": (16, 64)}
    scores = {name: torch.rand(min(shape), generator=generator) for name, shape in shapes.items()}
    scores["a"][10:20] = 0.3  # of equal ones the later go first
    kept = low_rank.highest(scores, shapes, ratio)
    ranks = {name: int(one.sum()) for name, one in kept.items()}
    share = low_rank.share(ranks, shapes)
    assert share <= ratio < share + (48 + 96) / sum(o * i for o, i in shapes.values())
    gone = torch.cat([scores[name][~one] for name, one in kept.items()])
    stay = torch.cat([scores[name][one] for name, one in kept.items() if one.sum() > 1])
    assert float(gone.max()) <= float(stay.min())
    assert kept["a"][10:20].tolist() == sorted(kept["a"][10:20].tolist(), reverse=True)


def test_each_matrix_keeps_its_best_direction_and_less_is_out_of_reach():
    shapes = {"a": (10, 10), "b": (10, 10)}
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0) - 100}
    kept = low_rank.highest(scores, shapes, 0.2)
    assert kept["a"].nonzero().flatten().tolist() == kept["b"].nonzero().flatten().tolist() == [9]
    with pytest.raises(ValueError, match=r"0.19 is out of reach: one direction of each matrix has 0.2000"):
        low_rank.highest(scores, shapes, 0.19)


def test_a_run_that_goes_on_ends_with_the_same_bits(original, text, tmp_path):
    model, found = run(stage(text), original, tmp_path)
    assert found["kept"] and found["open"] <= 0.75 and found["held_out_after"] < found["held_out_before"]
    whole = model.state_dict()
    shutil.rmtree(tmp_path / "training" / "attempt-0" / "checkpoint-8")
    (tmp_path / "training" / "attempts.json").unlink(missing_ok=True)
    again, refound = run(stage(text), original, tmp_path)
    assert refound == found and all(torch.equal(tensor, whole[name]) for name, tensor in again.state_dict().items())


def test_training_that_ranks_no_better_is_taken_back(original, tmp_path):
    """It learns a text whose end, by which it is judged, is another."""
    rows = ["0 " * 12] * 90 + [f"{n}xyxyyxxyyyxxxyyxyxyxyxx" for n in range(10)]
    (tmp_path / "text.txt").write_text("\n\n".join(rows))
    (tmp_path / "other.txt").write_text("a test text\n\nof two rows")
    text = FileText(name="text", file=str(tmp_path / "text.txt"), test_file=str(tmp_path / "other.txt"))
    model, found = run(stage(text, lr=0.2, tokens=4 * 4 * 12), original, tmp_path)
    values, _ = run(stage(text, rule="values"), original, tmp_path / "values")
    assert not found["kept"] and len(found["attempts"]) == 3
    assert all(torch.equal(tensor, values.state_dict()[name]) for name, tensor in model.state_dict().items())


# runs


def overrides(ground, *more: str) -> list[str]:
    return [
        "model=tiny", "data=text", f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", "order=[rank,cut]",
        f"outputs={ground / 'outputs'}", "rank=quick", "rank.tokens=1536", "rank.length=32", "rank.held_out=4",
        "rank.adapter_rank=4", "rank.lr=4e-3", "rank.until=0.5", "evaluate.context=32", "evaluate.limit=4",
        "evaluate.after=[cut]", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sizes(ground):
    """Three sizes, trained once; and an untrained one."""
    asked = [("masks", 0.9), ("masks", 0.7), ("masks", 0.5), ("values", 0.5)]
    return {
        (rule, ratio): pipeline(*overrides(ground, f"rank.rule={rule}", f"cut.ratio={ratio}")) for rule, ratio in asked
    }


def test_one_training_makes_any_size_within_its_target_and_better_than_singular_values(sizes, ground):
    assert len(list((ground / "outputs").glob("rank-*"))) == 2  # one for each rule
    scores = {key: outcome.record.scores[0].value for key, outcome in sizes.items()}
    for (rule, ratio), outcome in sizes.items():
        size, found = outcome.record.stages["cut"]["size"], outcome.record.stages["cut"]["found"]
        assert 0.99 * ratio <= found["ratio"] <= ratio
        assert size["linear_bits_per_weight"] == pytest.approx(16 * found["ratio"])
        name = {"masks": "ACIP", "values": "low rank (singular values)"}[rule]
        assert (method_name(outcome.record, "cut"), limit(outcome.record)) == (name, f"{16 * ratio:g}")
    assert scores["masks", 0.5] < scores["values", 0.5]
    trained = sizes["masks", 0.5].record.stages["rank"]["found"]
    assert trained["kept"] and trained["held_out_after"] < trained["held_out_before"]
    forms = [type(layer.stored) for layer in compressed(checkpoint.load(sizes["masks", 0.9].checkpoint)).values()]
    assert set(forms) == {LowRank, PlainWeight}  # a matrix of nearly all directions is dense


def test_a_smaller_model_has_of_the_directions_of_a_larger_one(sizes):
    large, small = (compressed(checkpoint.load(sizes["masks", ratio].checkpoint)) for ratio in (0.7, 0.5))
    pairs = [(large[name].stored, small[name].stored) for name in large]
    pairs = [(one, other) for one, other in pairs if isinstance(one, LowRank) and isinstance(other, LowRank)]
    assert pairs
    for one, other in pairs:
        rows = {tuple(row) for row in one.right.numbers.tolist()}
        assert {tuple(row) for row in other.right.numbers.tolist()} <= rows


def test_factors_are_compressed_by_a_method_and_its_bits_are_a_share_of_theirs(sizes, ground):
    """At half of the numbers and 4 bits each about 2; GPTQ sees what enters each factor."""
    more = ["cut.ratio=0.5", "cut=by_method", "cut.samples=8", "cut.length=32", "method=gptq", "bits=4.5"]
    outcome = pipeline(*overrides(ground, *more))
    size = outcome.record.stages["cut"]["size"]
    assert 1.9 < size["linear_bits_per_weight"] <= 4.5 * 0.5
    assert outcome.record.scores[0].value < 1.5 * sizes["masks", 0.5].record.scores[0].value
    named = method_name(outcome.record, "cut"), limit(outcome.record)
    assert named == ("ACIP, factors by GPTQ", "2.25")
    assert outcome.record.scores[0].seen.keys() == {"rank", "cut"}
    model = checkpoint.load(outcome.checkpoint)
    assert sum(size_of(model).ledger.values()) == 8 * tensor_bytes(outcome.checkpoint)


def test_the_plan_knows_both_stages(sizes, ground):
    for key in (("masks", 0.7), ("values", 0.5)):
        settings = overrides(ground, f"rank.rule={key[0]}", f"cut.ratio={key[1]}")
        plan = planned(composed(*settings))
        assert [row.name for row in plan.rows] == ["rank", "cut", "evaluate cut"] and not plan.exact
        stored = sizes[key].record.stages["cut"]["size"]["linear_bits_per_weight"]
        assert plan.size.linear_bits_per_weight == pytest.approx(stored, rel=0.05)
    by_method = planned(composed(*overrides(ground, "cut=by_method", "method=gptq", "bits=4.5")))
    assert 1.9 < by_method.size.linear_bits_per_weight <= 2.25 and not by_method.unknown
    told = r"^model\.layers\.0\.self_attn\.q_proj\.right: bits=1\.0 is out of reach"
    with pytest.raises(InputError, match=told):  # by the plan, which is made before all checks
        planned(composed(*overrides(ground, "cut=by_method", "method=gptq", "bits=1")))


def test_what_changes_no_result_is_in_no_key(text):
    assert stage(text).without_effect() == {"save_every", "gradient_checkpointing"}
    untrained = stage(text, rule="values")
    assert untrained.learns_from() is None and {"lr", "until", "tokens", "data"} <= untrained.without_effect()
    assert "rule" not in untrained.without_effect()
    assert cut(text).without_effect() == {"data", "samples", "length", "batch_size"}
    assert cut(text, method=composed("method=gptq", "bits=4").stages["cluster"].method).without_effect() == set()


def test_what_cannot_be_is_refused_before_any_work(original, text):
    with pytest.raises(InputError, match=r"cut.ratio=0.01 is out of reach: one direction of each matrix has 0\.0"):
        cut(text, ratio=0.01).check(original)
    with pytest.raises(InputError, match=r"rank.until=0.01 is out of reach"):
        stage(text, until=0.01).check(original)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        stage(text, adapter_rank=0)
    for ratio in (0.0, 1.1):
        with pytest.raises(ValidationError, match="ratio"):
            cut(text, ratio=ratio)
    method = composed("method=low_rank", "bits=null", "method.rank=40").stages["cluster"].method
    with pytest.raises(InputError, match=r"model.layers.0.self_attn.q_proj.right: method.rank=40"):
        cut(text, method=replace(method, weighting="none")).check(original)
    normalising = composed("method=onebit", "method.post_norm=true").stages["cluster"].method
    with pytest.raises(ValidationError, match="a factor cannot normalise"):
        cut(text, method=normalising)
    for order, told in (("[cluster,cut]", "what stage 'rank' leaves"), ("[rank,recover]", "a compressed model")):
        with pytest.raises(Exception, match=told):
            composed("method=rtn", "bits=4", f"order={order}")


def test_the_record_tells_the_ranks(sizes):
    found = sizes["masks", 0.5].record.stages["cut"]["found"]
    assert json.loads(json.dumps(found["ranks"])) == found["ranks"] and min(found["ranks"].values()) >= 1
