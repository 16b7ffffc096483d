"""A method of a user's own, in a folder outside the package: planned, run, trained, saved, loaded and tabled."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cluscomp.checkpoint  # noqa: F401 (teaches transformers the format)
from cluscomp.report.names import method_name
from cluscomp.store.records import read

# docs/extending.md, which shows it
METHOD = re.search(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "extending.md").read_text(), re.S)[1]


@pytest.fixture(scope="module")
def done(forks, ground):
    """What the command line does with it."""
    (ground / "mine" / "method").mkdir(parents=True)
    (ground / "mine" / "my_methods.py").write_text(METHOD)
    (ground / "mine" / "method" / "sign.yaml").write_text("_target_: my_methods.Sign\n")
    overrides = [
        "trust=my_methods", "method=sign", "model=tiny", "data=text",
        f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}",
        f"outputs={ground / 'outputs'}", "order=[cluster,block_finetune]", "evaluate.context=32", "evaluate.limit=4",
        "block_finetune=quick", "block_finetune.samples=4", "block_finetune.length=32", "block_finetune.lr=1e-3",
    ]  # fmt: skip
    command = f"import sys\nsys.path.insert(0, {str(ground / 'mine')!r})\nfrom cluscomp.__main__ import main\nmain()"
    result = forks.run("--config-dir", str(ground / "mine"), *overrides, script=command)
    assert result.returncode == 0, result.stderr[-2000:]
    (path,) = (ground / "outputs").glob("run-*/record.json")
    return read(path), ground / "outputs"


def test_it_is_planned_by_its_own_code(done):
    record, _ = done
    predicted = record.machine["predicted"]
    size = record.stages["cluster"]["size"]
    assert predicted["size"]["linear_bits_per_weight"] == size["linear_bits_per_weight"]
    assert "cluster" in predicted["seconds"] and predicted["peak_ram"]["cluster"] > 2**20
    assert 1 < size["linear_bits_per_weight"] < 2  # 1 bit a weight and 16 an output


def test_it_is_trained_and_tabled_under_its_own_name(done):
    record, _ = done
    blocks = record.stages["block_finetune"]["found"]["blocks"]
    assert any(block["after"] < block["before"] for block in blocks)
    assert method_name(record, "cluster") == "sign" and method_name(record, "block_finetune") == "sign + block_finetune"
    assert record.config["stages"]["cluster"]["method"] == {"class": "my_methods.Sign"}
    assert json.dumps(record.choices["method"]) == '{"yaml": "sign", "differs": {}}'


def test_plain_transformers_loads_it(done, ids):
    _, outputs = done
    (folder,) = outputs.glob("block_finetune-*/checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in (module for module in model.modules() if hasattr(module, "stored")):
        dense_OI = layer.stored(torch.float32).detach()
        assert torch.equal(dense_OI.abs(), dense_OI[:, :1].abs().expand_as(dense_OI))
    with torch.no_grad():
        assert bool(model(ids).logits.isfinite().all())
