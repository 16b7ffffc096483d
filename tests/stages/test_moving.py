"""Codes that move while blocks learn, tokens that the loss leaves out, and windows that no step learns from."""

import pytest
import torch
from layers import correlated, made_by, statistic_of
from pydantic import ValidationError
from reference.recipe import IDLE, NO_DATA, PAPER, STORED
from test_block_finetune import CPU, METHOD, mse, same, stage, streams, tensors
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.data.texts import calibration_windows, split
from cluscomp.errors import InputError
from cluscomp.forms.codebook import CodebookWeight, sub_vectors
from cluscomp.forms.linear import compressed
from cluscomp.forms.sum import Sum
from cluscomp.methods.aqlm import Aqlm
from cluscomp.methods.cluscomp import ClusComp
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.models.original import Original
from cluscomp.models.walk import Walk
from cluscomp.plan.meta import MetaModel
from cluscomp.stages import Job, block_finetuning
from cluscomp.stages.block_finetuning import finetune_block
from cluscomp.stages.block_windows import all_batches
from cluscomp.stages.cluster import Cluster
from cluscomp.train.masters import Group, Trained, fit, moving
from cluscomp.train.moving import MovingCodes, nearest

MOVING = {"codes": "moving", "moves": 0.02, "codes_lr": 0.1, "loss": "relative"}
HAND = {"bits": None, "vector_dim": 4, "codebook_size": 16, "iterations": 5}
SHARED = {"axis": "out", "storage": "float16", "share": "block", "allocation": "uniform", "floor": 0.0, "measure": True}
METHODS = {
    "out": METHOD,
    "in, 8 bits": ClusComp(**HAND, **PAPER, **NO_DATA, **STORED | {"axis": "in", "storage": "int8"}),
    "shared": ClusComp(**HAND, **PAPER, **NO_DATA, **SHARED),
    "added": Aqlm(**HAND, codebooks=2, allocation="uniform", storage="float16", rounds=1, least_squares=5, beam=1,
                  damping=0.01),
}  # fmt: skip


def one_weight(name: str) -> CodebookWeight:
    weight_OI, x_TI = correlated(18, 22, 3)
    return made_by(METHODS[name], weight_OI, statistic_of(x_TI), torch.Generator()).requires_grad_(False)


@pytest.mark.parametrize("name", METHODS)
def test_a_shift_has_the_gradient_of_the_weight_and_is_no_part_of_it(name):
    weight = one_weight(name)
    before_OI = weight(torch.float32)
    learned = MovingCodes(weight)
    learned.to_masters()
    learned.shift.data.normal_(generator=torch.Generator().manual_seed(0))
    dense_OI = learned(torch.float32)
    torch.testing.assert_close(dense_OI, before_OI)
    wanted_OI = torch.randn(before_OI.shape, generator=torch.Generator().manual_seed(1))
    shift_ND, books_MKD = torch.autograd.grad((dense_OI * wanted_OI).sum(), [learned.shift, learned.codebooks])
    assert torch.equal(shift_ND, sub_vectors(wanted_OI, 4, weight.axis))
    by_hand = Parameter(learned.centroids(torch.float32).detach())
    summed_ND = sum(by_hand[number][codes_N] for number, codes_N in enumerate(learned.unpacked()))
    (expected_MKD,) = torch.autograd.grad((summed_ND * shift_ND).sum(), [by_hand])
    scales_M = 1 if weight.scales is None else learned.scales[:, None, None]
    torch.testing.assert_close(books_MKD, expected_MKD * scales_M, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_largest_shifts_take_the_nearest_centroids_and_no_others(name):
    weight = one_weight(name)
    learned = MovingCodes(weight)
    learned.to_masters()
    shift_ND = torch.randn(learned.shift.shape, generator=torch.Generator().manual_seed(0))
    learned.shift.data = shift_ND.clone()
    codes_MN, books_MKD = learned.unpacked(), learned.centroids(torch.float32)
    wanted_ND = sum(book_KD[codes_N] for book_KD, codes_N in zip(books_MKD, codes_MN)) + shift_ND
    moved, count = learned.move(0.1), int(0.1 * len(shift_ND))
    changed_N = (learned.unpacked() != codes_MN).any(0)
    assert 0 < moved == int(changed_N.sum()) <= count
    largest_N = torch.zeros_like(changed_N).index_fill(0, shift_ND.norm(dim=1).argsort(descending=True)[:count], True)
    assert not bool((changed_N & ~largest_N).any())
    assert torch.equal(learned.shift[~changed_N], shift_ND[~changed_N])
    now_ND = sum(book_KD[codes_N] for book_KD, codes_N in zip(books_MKD, learned.unpacked()))
    far_N = (wanted_ND - now_ND).norm(dim=1)
    torch.testing.assert_close(learned.shift, wanted_ND - now_ND)
    if len(books_MKD) == 1:
        best_N = torch.cdist(wanted_ND, books_MKD[0]).amin(1)
        torch.testing.assert_close(far_N[largest_N], best_N[largest_N])
    assert bool((far_N <= shift_ND.norm(dim=1) + 1e-5).all())  # as it was, or nearer
    assert learned.move(0.0) == 0
    learned.to_storage()
    given = learned.give_back()
    assert given is weight and torch.equal(weight.unpacked(), learned.unpacked())
    assert torch.equal(weight(torch.float32), learned(torch.float32)) and not learned.shift.numel()


def test_codes_inside_other_forms_move_too_and_are_put_back():
    parts = [one_weight("out"), one_weight("added")]
    block = torch.nn.Sequential(Sum([*parts]))
    before = [part.unpacked() for part in parts]
    with moving(block):
        trained = [module for module in block.modules() if isinstance(module, MovingCodes)]
        block[0].to_masters()
        for one in trained:
            one.shift.data.normal_(generator=torch.Generator().manual_seed(0))
            assert one.move(0.2)
        block[0].to_storage()
    assert block[0].parts == parts and len(trained) == 2
    assert all(not torch.equal(part.unpacked(), codes) for part, codes in zip(parts, before))


def test_the_nearest_centroid_is_that_of_all_distances():
    vectors_CD, centroids_KD = torch.randn(50, 3), torch.randn(7, 3)
    assert torch.equal(nearest(vectors_CD, centroids_KD).long(), torch.cdist(vectors_CD, centroids_KD).argmin(1))


def test_groups_have_rates_and_betas_of_their_own():
    first, second, by_hand = (Parameter(torch.ones(3)) for _ in range(3))
    plain = {"lr": 0.1, "weight_decay": 0.1, "schedule": "linear", "warmup": 0.0, "clip": None, "half": False}
    targets, told = list(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))), []
    loss = lambda target: (first - target).square().sum() + (second - target).square().sum()  # noqa: E731
    assert fit([first], loss, targets, **plain, groups=[Group([second], 0.02, (0.0, 0.9))], after=told.append) is None
    optimizer = torch.optim.Adam([by_hand], betas=(0.0, 0.9))
    for step, target in enumerate(targets):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 4)
        by_hand.grad = 2 * (by_hand.detach() - target)
        optimizer.step()
    torch.testing.assert_close(second, by_hand)
    assert told == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def clustered(families, tmp_path_factory):
    """A small Llama clustered with codebooks of its own and with added ones: original, and a builder by name."""
    folder = tmp_path_factory.mktemp("clustered")

    def build(name: str = "out"):
        if not (folder / name).exists():
            original = Original(families("llama"), torch.float32, CPU)
            model = original.model()
            settings = IDLE | ({"samples": 4, "length": 12} if METHODS[name].sees() else {})
            Cluster(method=METHODS[name], **settings).run(model, Job(folder / f"{name} parts", 0, original))
            checkpoint.save(model, original.tokenizer, folder / name)
        return checkpoint.load(folder / name)

    return Original(families("llama"), torch.float32, CPU), build


@pytest.mark.parametrize("name", ["out", "added"])
def test_codes_move_and_blocks_come_nearer_to_the_original(clustered, text, tmp_path, name):
    original, build = clustered
    results = {}
    for codes in ("fixed", "moving"):
        model = build(name)
        before = tensors(model)
        (tmp_path / codes).mkdir()
        settings = MOVING | {"codes": codes, "epochs": 12, "lr": 1e-3}
        found = stage(text, **settings).run(model, Job(tmp_path / codes, 0, original))["blocks"]
        kinds = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], model.state_dict()[key])}
        assert kinds == ({"codebooks"} if codes == "fixed" else {"codebooks", "codes"})
        assert all(type(layer.stored) is CodebookWeight for layer in compressed(model).values())
        assert all(("codes_moved" in numbers) == (codes == "moving") for numbers in found)
        assert all(numbers["codes_moved"] > 0.02 for numbers in found if codes == "moving")
        assert all(numbers["after"] < numbers["before"] for numbers in found)
        results[codes] = found[0]["after"]
        checkpoint.save(model, original.tokenizer, tmp_path / codes / "checkpoint")
        assert same(tensors(checkpoint.load(tmp_path / codes / "checkpoint")), tensors(model))
    assert results["moving"] < results["fixed"] or name == "added"


def test_a_share_of_none_changes_no_bit(clustered, text, tmp_path):
    original, build = clustered
    found = []
    for name, settings in {"fixed": {"codes": "fixed"}, "none": MOVING | {"moves": 0.0, "loss": "mse"}}.items():
        model = build()
        (tmp_path / name).mkdir()
        numbers = stage(text, held_out=2, **settings).run(model, Job(tmp_path / name, 0, original))["blocks"]
        found.append((tensors(model), [{k: v for k, v in one.items() if k != "codes_moved"} for one in numbers]))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_no_more_than_their_share_moves_in_a_step(clustered, text, tmp_path, monkeypatch):
    original, build = clustered
    counts, move = [], MovingCodes.move

    def counted(self, share):
        before_MN = self.unpacked()
        told = move(self, share)
        counts.append((int((self.unpacked() != before_MN).any(0).sum()), told, int(share * self.num_codes)))
        return told

    monkeypatch.setattr(MovingCodes, "move", counted)
    model = build()
    stage(text, **MOVING).run(model, Job(tmp_path, 0, original))
    assert len(counts) >= 3 * 12 * 7 and any(found for found, *_ in counts)
    assert all(found == told <= most for found, told, most in counts)


SETTINGS = {
    "moving": {**MOVING, "held_out": 3, "skip": 1, "order": "shuffled"},
    "moving, two targets": {**MOVING, "held_out": 2, "target": "both", "norms": True, "streams": "disk"},
    "fixed": {"held_out": 2, "skip": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stage_that_was_stopped_ends_with_the_same_bits(clustered, text, tmp_path, monkeypatch, name):
    original, build = clustered
    chosen = stage(text, **SETTINGS[name])
    whole, model = build(), build()
    (tmp_path / "whole").mkdir(), (tmp_path / "stopped").mkdir()
    found = chosen.run(whole, Job(tmp_path / "whole", 0, original))

    def stops(stage, walk, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        return finetune_block(stage, walk, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(block_finetuning, "finetune_block", stops)
        with pytest.raises(KeyboardInterrupt):
            chosen.run(model, Job(tmp_path / "stopped", 0, original))
    assert all(type(layer.stored) is CodebookWeight for layer in compressed(model).values())
    again = build()
    assert chosen.run(again, Job(tmp_path / "stopped", 0, original)) == found
    assert same(tensors(again), tensors(whole))


def entering(clustered, text, **changed):
    """A clustered model's first block before training: settings, the walk, its inputs and the original's outputs."""
    original, build = clustered
    chosen, walk = stage(text, **changed), Walk(build())
    ids_WT = torch.from_numpy(chosen.windows(original.tokenizer, 0))
    entering_WTH = torch.cat([walk.embed(ids_WT[rows]) for rows in all_batches(chosen)])
    dense = AutoModelForCausalLM.from_pretrained(original.folder, dtype=torch.float32).eval()
    walk.embed(ids_WT[:1])
    return chosen, walk, entering_WTH, streams(dense, ids_WT)[1][0]


def test_held_out_windows_are_of_the_texts_end_and_decide(clustered, text, caplog):
    """The loss that is kept is theirs, of what is stored, and never above the start's."""
    for lr in (3e-3, 3e4):
        chosen, walk, entering_WTH, target_WTH = entering(clustered, text, held_out=3, lr=lr, skip=1)
        before = tensors(walk.model)
        leaving_WTH = torch.empty_like(entering_WTH)
        found = finetune_block(chosen, walk, 0, entering_WTH, [target_WTH], leaving_WTH, 0)
        assert found["held_out_after"] == pytest.approx(mse(leaving_WTH[6:, 1:], target_WTH[6:, 1:]), rel=1e-5)
        assert found["after"] == pytest.approx(mse(leaving_WTH[:6, 1:], target_WTH[:6, 1:]), rel=1e-5)
        assert found["square"] == pytest.approx(float(target_WTH[:6, 1:].square().mean()))
        assert (found["held_out_after"] < found["held_out_before"]) is (lr == 3e-3)
        assert found["kept"] is (lr == 3e4) and same(before, tensors(walk.model)) is (lr == 3e4)
    assert found["held_out_after"] == found["held_out_before"] and len(found["reasons"]) == 3
    original, _ = clustered
    first, last = split(text.text("calibration"), 0.1)
    windows_WT = stage(text, held_out=3).windows(original.tokenizer, 5)
    assert (windows_WT[:6] == calibration_windows(first, original.tokenizer, samples=6, length=12, seed=5)).all()
    assert (windows_WT[6:] == calibration_windows(last, original.tokenizer, samples=3, length=12, seed=5)).all()


def test_of_a_training_that_first_helps_the_best_state_is_taken(clustered, text):
    """At a rate that overfits the few windows, the best of four states and not the last one counts."""
    settings = {"held_out": 6, "lr": 0.03, "epochs": 40, "schedule": "constant"}
    chosen, walk, entering_WTH, target_WTH = entering(clustered, text, **settings)
    losses = []

    class Watched(block_finetuning.Best):
        def look(self, step):
            super().look(step)
            losses.append((self._least, self.state is not None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_finetuning, "Best", Watched)
        found = finetune_block(chosen, walk, 0, entering_WTH, [target_WTH], torch.empty_like(entering_WTH), 0)
    assert found["held_out_after"] == pytest.approx(losses[-1][0], rel=1e-2)
    assert found["held_out_after"] <= found["held_out_before"]


def test_a_state_can_be_returned_to(clustered):
    _, build = clustered
    block = Walk(build()).blocks[0]
    with moving(block):
        trained = Trained(block, codebooks=True, others={"input_layernorm.weight": block.input_layernorm.weight})
        begun = tensors(block)
        trained.start()
        moves = [one for one in block.modules() if isinstance(one, MovingCodes)]
        for part in trained.parameters:
            part.data += 0.1
        for one in moves:
            one.move(0.3)
        state, middle = trained.state(), tensors(block)
        for part in trained.parameters:
            part.data += torch.randn_like(part)
        assert sum(one.move(0.3) for one in moves) and not same(middle, tensors(block))
        trained.return_to(state)
        assert same(middle, tensors(block))
        assert trained.finish() is None
        trained.restore()
        assert same({key: value for key, value in begun.items() if "shift" not in key},
                    {key: value for key, value in tensors(block).items() if "shift" not in key})  # fmt: skip


@pytest.mark.parametrize("learns", ["values", "means", "moving"])
def test_tokens_that_are_skipped_do_not_influence_the_result(clustered, text, learns):
    found = []
    settings = MOVING if learns == "moving" else {"learns": learns}
    for change in (0.0, 1e3):
        chosen, walk, entering_WTH, target_WTH = entering(clustered, text, skip=1, held_out=2, **settings)
        target_WTH = target_WTH.clone()
        target_WTH[:, 0] += change
        numbers = finetune_block(chosen, walk, 0, entering_WTH, [target_WTH], torch.empty_like(entering_WTH), 0)
        found.append((numbers, tensors(walk.model)))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])
    assert not found[0][0]["kept"] or learns == "means"


def test_what_cannot_be_is_refused(clustered, text):
    with pytest.raises(ValidationError, match=r"codes=moving needs learns=values \(here means\)"):
        stage(text, codes="moving", learns="means")
    with pytest.raises(ValidationError, match="skip=12 leaves nothing of windows of 12 tokens"):
        stage(text, skip=12)
    original, _ = clustered
    outline = MetaModel(original.config, torch.float32, "cpu")
    Cluster(method=RoundToNearest(bits=None, width=3, group=8, symmetric=False), **IDLE).cost(outline)
    with pytest.raises(InputError, match=r"codes=moving needs a method with codebooks.*q_proj is a UniformWeight"):
        stage(text, codes="moving").cost(outline)


def test_it_is_counted_as_memory_and_work(clustered, text):
    original, _ = clustered
    outline = MetaModel(original.config, torch.float32, "cpu")
    Cluster(method=METHOD, **IDLE).cost(outline)
    fixed, held, moves = (
        stage(text, **settings).cost(outline) for settings in ({}, {"held_out": 6}, {"codes": "moving"})
    )
    numbers = sum(outputs * inputs for outputs, inputs in outline.dense.values())
    peaks = [sum(cost.device.values()) for cost in (fixed, held, moves)]
    assert peaks[1] > peaks[0] and moves.device["what learns besides"] >= 16 * numbers
    assert fixed.work.flops < moves.work.flops and fixed.work.traffic < moves.work.traffic
    assert 1.2 * fixed.work.flops < held.work.flops
