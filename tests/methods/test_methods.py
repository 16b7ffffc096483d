"""Every method of conf/method through the whole pipeline on a tiny model; its own truth stands in its own file."""

import pytest
import torch
from pipelines import composed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluscomp.checkpoint import load
from cluscomp.command.compose import CONF
from cluscomp.forms.linear import compressed
from cluscomp.plan import dry
from cluscomp.plan.places import Place
from cluscomp.runs.run import run as execute

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if "_global_" not in path.read_text())
METHODS.append("slim")  # what stands beside codes goes through all stages, too
STAGES = ["cluster", "block_finetune", "recover", "finetune"]
SMALL = [
    "model=tiny", "model.config.num_hidden_layers=1", "data=text", "bits=4", "evaluate.after=[]",
    "evaluate.context=32", "evaluate.limit=4",
    f"order=[{','.join(STAGES)}]", "cluster.samples=4", "cluster.length=32", "block_finetune=quick",
    "block_finetune.samples=4", "block_finetune.length=32", "block_finetune.lr=1e-3", "block_finetune.norms=false",
    "recover.tokens=512", "recover.length=32", "recover.batch_size=4", "recover.accumulation=1",
    "recover.held_out=4", "recover.lr=1e-3", "instructions=text", "finetune.length=32", "finetune.examples=16",
    "finetune.epochs=1", "finetune.held_out=4", "finetune.batch_size=4", "finetune.accumulation=1",
    "finetune.lr=1e-3",
]  # fmt: skip


@pytest.fixture(scope="module", params=METHODS)
def run(request, ground):
    """A run of all stages with the method, and whether its plan was sure of the stored form."""
    places = [f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", f"outputs={ground / request.param}"]
    experiment = composed(*SMALL, *places, f"method={request.param}")
    places = {"one": Place(48, 32, 0), "other": Place(32, 32, 0)}  # a method may share bits out among layers
    exact = dry.compress(experiment.stages["cluster"].whole, places, torch.float32).exact
    return execute(experiment), exact


def test_each_stage_trains_what_is_stored_and_spends_no_bit(run):
    outcome, _ = run
    stages = outcome.record.stages
    folders = [next(outcome.checkpoint.parents[1].glob(f"{name}-*/checkpoint")) for name in STAGES]
    stored = [load_file(folder / "model.safetensors") for folder in folders]
    for name, before, after in zip(STAGES[1:], stored, stored[1:]):
        assert stages[name]["size"] == stages["cluster"]["size"]
        changed = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
        assert changed and changed <= {"codebooks", "scales", "numbers", "steps", "mean"}, (name, changed)
    blocks = stages["block_finetune"]["found"]["blocks"]
    assert all(block["after"] <= block["before"] for block in blocks)
    assert any(block["after"] < block["before"] for block in blocks)


def test_the_plan_counts_what_is_stored_within_the_limit(run):
    outcome, exact = run
    size, predicted = outcome.record.stages["cluster"]["size"], outcome.record.machine["predicted"]["size"]
    least = 1 if outcome.record.choices["method"]["yaml"] == "onebit" else 3  # whose bits follow from the shapes
    assert least < size["linear_bits_per_weight"] <= 4
    if exact:
        assert predicted["linear_bits_per_weight"] == size["linear_bits_per_weight"]


def test_plain_transformers_computes_the_same(run, ids):
    outcome, _ = run
    with torch.no_grad():
        expected = load(outcome.checkpoint)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(outcome.checkpoint)
        assert torch.equal(model(ids).logits, expected)
        dense = {name: layer.stored(torch.float32) for name, layer in compressed(model).items()}
        for name, weight_OI in dense.items():
            linear = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
            linear.weight.data = weight_OI
            model.set_submodule(name, linear)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
