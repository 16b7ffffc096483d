"""Dense stages, by the smallest: what it leaves, who reads it, order, plan, record, kills; a stage of a user's own."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from pipelines import composed, pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp import checkpoint
from cluscomp.data.texts import calibration_windows
from cluscomp.errors import InputError
from cluscomp.forms.linear import compressed
from cluscomp.models.original import Original, blocks, linears
from cluscomp.models.sources import TinyModel
from cluscomp.report.names import method_name
from cluscomp.runs.preparation import planned
from cluscomp.stages import Job
from cluscomp.stages.block_finetuning import compressed_weights
from cluscomp.stages.parts import read_part
from cluscomp.stages.round import Round

WIDTH, GROUP = 4, 24  # of 64 inputs: three groups of 22, 21 and 21
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama in bfloat16, with a generation config of its own."""
    place = tmp_path_factory.mktemp("model")
    config = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "tie_word_embeddings": True,
    }  # fmt: skip
    made = TinyModel(architecture="llama", config=config, seed=0).folder(place / "cache")
    dense = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    dense.generation_config.max_new_tokens = 7
    dense.save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(made).save_pretrained(place / "model")
    return place / "model"


def command(model, ground, outputs, *more: str) -> list[str]:
    return [
        "model=hub", f"model.id={model}", "data=text", f"data.file={ground / 'text.txt'}", f"outputs={outputs}",
        f"cache={ground / 'cache'}", "method=rtn", "bits=3", f"round.width={WIDTH}", f"round.group={GROUP}",
        "order=[round,cluster]", "evaluate.context=32", "evaluate.limit=4", "evaluate.distance=true",
        "block_finetune=quick", "block_finetune.length=32", "block_finetune.samples=4", "block_finetune.epochs=1",
        "block_finetune.norms=false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rounded(model, ground):
    """The finished run, and the folders that its stages left."""
    outputs = ground / "rounded"
    outcome = pipeline(*command(model, ground, outputs, "order=[round,cluster,block_finetune]"))
    return outcome, {name: folder_of(outputs, name) for name in ("round", "cluster", "block_finetune")}


def folder_of(outputs, name):
    (folder,) = outputs.glob(f"{name}-*/checkpoint")
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    """All tensors of a dense folder by plain transformers, in the dtype it says."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@torch.no_grad()
def first_block(folder, ids_WT: torch.Tensor) -> torch.Tensor:
    """What the first block of a model hands on, by plain transformers and a hook."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    blocks(model)[0].register_forward_hook(lambda _module, _args, output: found.append(output))
    model(ids_WT)
    return found[0][0] if isinstance(found[0], tuple) else found[0]


def on_grids(weight_OI: np.ndarray, width: int, group: int) -> np.ndarray:
    """By hand: groups as equal as can be, scales of 16 bits, each weight to the nearest value."""
    found, count = weight_OI.copy(), -(-weight_OI.shape[1] // group)
    ends = [-(-number * weight_OI.shape[1] // count) for number in range(count + 1)]
    for row in found:
        for first, end in zip(ends, ends[1:]):
            scale = np.float32(np.float16(2 * np.abs(row[first:end]).max() / (2**width - 1)))
            steps = np.clip(np.round(row[first:end] / scale + 2 ** (width - 1)), 0, 2**width - 1) - 2 ** (width - 1)
            row[first:end] = steps * scale
    return found


def test_it_leaves_an_ordinary_folder_with_the_rounded_weights(model, rounded):
    """Everything else is the original's, dtype and generation config too."""
    _, folders = rounded
    before, after = weights(model), weights(folders["round"])
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = [name for name in before if ".layers." in name and before[name].ndim == 2]
    assert len(changed) == 3 * 7
    for name, tensor in after.items():
        if name in changed:
            expected = torch.from_numpy(on_grids(before[name].float().numpy(), WIDTH, GROUP)).bfloat16()
            assert torch.equal(tensor, expected) and not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    told = json.loads((folders["round"] / "generation_config.json").read_text())
    assert told["max_new_tokens"] == 7
    assert len(checkpoint.verify(folders["round"])) >= 6


def test_the_next_stage_compresses_the_rounded_weights(rounded):
    outcome, folders = rounded
    before = weights(folders["round"])
    found = outcome.record.stages["cluster"]["found"]["relative_error_by_layer"]
    for name, layer in compressed(checkpoint.load(folders["cluster"])).items():
        weight_OI = before[f"{name}.weight"].double()
        lost = float((layer.stored(torch.float32).double() - weight_OI).square().sum() / weight_OI.square().sum())
        assert found[name] == pytest.approx(lost)


def test_what_is_learned_and_compared_with_is_the_model_before_all_stages(model, ground, rounded):
    outcome, folders = rounded
    text = composed(*command(model, ground, ground / "rounded")).stages["block_finetune"].data.text("calibration")
    windows = calibration_windows(text, AutoTokenizer.from_pretrained(model), samples=4, length=32, seed=0)
    first, dense, clustered = (
        first_block(folder, torch.from_numpy(windows)) for folder in (model, folders["round"], folders["cluster"])
    )
    before = outcome.record.stages["block_finetune"]["found"]["blocks"][0]["before"]
    assert before == pytest.approx(float((clustered - first).square().mean()), rel=1e-5)
    assert before != pytest.approx(float((clustered - dense).square().mean()), rel=1e-4)
    distance = {score.after: score.value for score in outcome.record.scores if score.metric == "kl"}
    assert distance["original"] == 0 < distance["round"] < distance["cluster"]


def test_weights_that_learn_to_round_start_from_those_that_were_compressed(model, rounded):
    folder = rounded[1]["round"]
    job = Job(folder, 0, Original(folder, torch.float32, CPU), Original(model, torch.float32, CPU))
    assert job.teacher.folder == model
    ours = checkpoint.load(rounded[1]["cluster"])
    found = compressed_weights(blocks(ours)[1], 1, ours, job.original)
    dense = linears(blocks(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))[1])
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[name], dense[name].weight) for name in dense)


def test_the_record_holds_the_first_original_and_the_size_of_the_file(model, ground, rounded, tmp_path):
    """Scores after the stage are those of its folder, scored by itself."""
    outcome, folders = rounded
    record = outcome.record
    assert list(record.stages) == ["round", "cluster", "block_finetune"]
    names = ["original + round", "round + RTN", "round + RTN + block_finetune"]
    assert [method_name(record, stage) for stage in record.stages] == names
    size = record.stages["round"]["size"]
    assert size["linear_bits_per_weight"] == size["model_bits_per_weight"] == 16
    assert size["checkpoint_bytes"] == sum(path.stat().st_size for path in folders["round"].glob("*.safetensors"))
    stored = sum(tensor.numel() for name, tensor in weights(folders["round"]).items() if name != "lm_head.weight")
    assert size["ledger"] == {"kept": 16 * stored}
    assert record.size["original"]["checkpoint_bytes"] == (model / "model.safetensors").stat().st_size
    assert (
        record.size["linear_bits_per_weight"] == record.stages["block_finetune"]["size"]["linear_bits_per_weight"] <= 3
    )
    alone = pipeline(*command(folders["round"], ground, tmp_path, "order=[evaluate]")).record.scores
    kinds = ("perplexity", "bits_per_byte")
    again = {score.metric: score.value for score in alone if score.metric in kinds}
    assert again == {
        score.metric: score.value for score in record.scores if score.after == "round" and score.metric in kinds
    }
    first = {score.value for score in record.scores if score.metric == "perplexity" and score.after == "original"}
    assert first != {again["perplexity"]}


@pytest.mark.parametrize(
    ("order", "wrong"),
    [
        ("[cluster,round]", "stage 'round' cannot come after 'cluster': it takes one that is not compressed yet"),
        ("[round,block_finetune]", "stage 'block_finetune' cannot come after 'round': it takes a compressed model"),
        ("[block_finetune]", "stage 'block_finetune' cannot come first: it takes a compressed model"),
        ("[round,cluster,cluster]", "stage 'cluster' is named twice"),
    ],
)
def test_the_order_follows_from_what_stages_take_and_give(order, wrong):
    with pytest.raises(InputError, match=f"order.*{wrong}"):
        composed("model=tiny", "bits=3", f"order={order}")
    assert composed("model=tiny", "bits=3", "order=[round]").order == ["round"]


def test_the_plan_has_the_stage_and_the_size_without_it(model, ground, tmp_path):
    plans = [
        planned(composed(*command(model, ground, tmp_path, f"order={order}", "evaluate.after=[]")))
        for order in ("[round,cluster]", "[cluster]", "[round]")
    ]
    assert [[row.name for row in plan.rows] for plan in plans] == [["round", "cluster"], ["cluster"], ["round"]]
    assert plans[0].size == plans[1].size and plans[0].checkpoint_bytes == plans[1].checkpoint_bytes
    assert plans[2].size.linear_bits_per_weight == 16 and plans[0].rows[0].ram > 0


def test_blocks_leave_memory_and_a_stage_that_lost_some_ends_with_the_same_bits(tiny_folder, tmp_path, caplog):
    original = Original(tiny_folder, torch.float32, CPU)
    stage = Round(width=WIDTH, group=GROUP)
    parts = [tmp_path / f"block-00{index}.safetensors" for index in range(3)]
    first = original.model()
    found = stage.run(first, Job(tmp_path, 0, original))
    assert all(parameter.is_meta for block in blocks(first) for parameter in block.parameters())
    written = [{name: part.clone() for name, part in read_part(path).others.items()} for path in parts]
    parts[0].unlink()
    content = bytearray(parts[2].read_bytes())
    content[-1] ^= 1
    parts[2].write_bytes(content)
    assert stage.run(original.model(), Job(tmp_path, 0, original)) == found
    assert "is damaged" in caplog.text
    for part, before in zip(parts, written):
        after = read_part(part).others
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_weight_that_is_not_finite_is_refused_by_name(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    blocks(dense)[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    dense.save_pretrained(tmp_path / "model")
    original = Original(tmp_path / "model", torch.float32, CPU)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: .*nan"):
        Round(width=8, group=16).run(original.model(), Job(tmp_path, 0, original))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(ground, forks, tmp_path):
    """24 blocks, killed when the first one is written."""
    base = [
        "model=tiny", "model.config.num_hidden_layers=24", "data=text", f"data.file={ground / 'text.txt'}",
        f"cache={ground / 'cache'}", "order=[round]", "method=rtn", "bits=3", "evaluate.context=32",
        "evaluate.after=[]",
    ]  # fmt: skip
    whole = pipeline(*base, f"outputs={tmp_path / 'whole'}").record.stages
    killed = tmp_path / "killed"
    forks.kill_at(killed, "round-*/block-000.safetensors", *base, f"outputs={killed}")
    assert not list(killed.glob("round-*/metrics.json")), "too late: the stage had ended"
    assert 1 <= len(list(killed.glob("round-*/block-*"))) < 24
    assert pipeline(*base, f"outputs={killed}").record.stages == whole
    assert {path.name for path in killed.glob("round-*/*")} == {"checkpoint", "metrics.json"}


OWN = '''
"""A stage of a user's own, in a module of the user's own."""
from typing import ClassVar

from cluscomp.models.original import blocks
from cluscomp.settings import settings


@settings
class Shrink:
    """All weights of the first block times a factor; all blocks stay in memory."""

    takes: ClassVar[str] = "original"
    gives: ClassVar[str] = "original"
    distributed: ClassVar[bool] = False
    factor: float

    def learns_from(self):
        return None

    def without_effect(self):
        return set()

    def check(self, original):
        pass

    def cost(self, outline):
        return None

    def run(self, model, job):
        for index in range(len(blocks(model))):
            job.original.load_block(model, index)
        for parameter in blocks(model)[0].parameters():
            parameter.mul_(self.factor)
        return {"factor": self.factor}


@settings
class Pack(Shrink):
    """Says that it compresses, but not what that costs."""

    gives: ClassVar[str] = "compressed"
'''


def test_a_stage_of_a_users_own_is_found_by_its_yaml_runs_and_is_planned_as_not_known(
    model, ground, tmp_path, monkeypatch
):
    (tmp_path / "my_stages.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["+shrink={_target_: my_stages.Shrink, factor: 0.5}", "order=[shrink,cluster]", "trust=my_stages"]
    arguments = command(model, ground, tmp_path / "outputs", *own)
    plan = planned(composed(*arguments))
    assert plan.unknown == ("shrink",) and "\nshrink " in plan.table() and "not known" in plan.table()
    assert [row.name for row in plan.rows][-2:] == ["cluster", "evaluate cluster"] and not plan.exact
    with torch.no_grad():
        outcome = pipeline(*arguments)
    assert outcome.record.stages["shrink"]["found"] == {"factor": 0.5}
    before, after = weights(model), weights(folder_of(tmp_path / "outputs", "shrink"))
    for name, tensor in before.items():
        factor = 0.5 if ".layers.0." in name else 1.0
        assert torch.equal(after[name], factor * tensor)
    packed = ["+pack={_target_: my_stages.Pack, factor: 0.5}", "order=[pack,recover]", "trust=my_stages"]
    plan = planned(composed(*command(model, ground, tmp_path / "outputs", *packed)))
    assert plan.unknown == ("pack", "evaluate pack", "recover", "evaluate recover")
    assert plan.size is None and "size      not known" in plan.table() and plan.predicted()["size"] is None
    del sys.modules["my_stages"]
