"""`from cluscomp import compress, load, export`: the same runs as the command's."""

import subprocess
import sys

import pytest
import torch
from pipelines import composed, pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

import cluscomp
from cluscomp import checkpoint, compress, export, load
from cluscomp.errors import InputError
from cluscomp.forms.layers import Size
from cluscomp.runs.card import card

EVALUATE = {"context": 32, "limit": 2}


@pytest.fixture(scope="module")
def folder(ground, tiny_folder):
    """A small original in bfloat16."""
    place = ground / "original"
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(place)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def called(ground, folder):
    """A call, and what it leaves."""

    def call(**more):
        settings = {
            "data": "text", "data.file": ground / "text.txt", "cache": ground / "cache", "evaluate": EVALUATE,
            "cluster": {"samples": 2, "length": 32}, "method": {"vector_dim": 4, "codebook_size": 16}, "seed": 3,
            "order": ["cluster"],
        }  # fmt: skip
        return compress(folder, output_dir=ground / "out", **settings | more)

    return call, call()


def test_a_call_is_the_run_of_the_command(called, ground, folder):
    call, outcome = called
    settings = [
        "model=hub", f"model.id={folder}", "data=text", f"data.file={ground / 'text.txt'}",
        f"cache={ground / 'cache'}", "evaluate.context=32", "evaluate.limit=2", "cluster.samples=2",
        "cluster.length=32", "method.vector_dim=4", "method.codebook_size=16", "seed=3", "order=[cluster]",
    ]  # fmt: skip
    assert outcome.path.is_relative_to(ground / "out") and outcome.checkpoint.is_relative_to(ground / "out")
    other = pipeline(*settings, f"outputs={ground / 'out'}")
    assert other.record == outcome.record and other.path == outcome.path  # finished before, not made anew
    assert call().record == outcome.record
    cells = list((ground / "out" / "cells" / "run").iterdir())
    assert len(cells) == 1 and (cells[0] / "cell.json").is_file()


def test_its_checkpoint_loads_generates_and_is_exported(called, tmp_path, ids):
    """Measured in float32 on this machine, it stays a model in bfloat16."""
    _, outcome = called
    model = load(str(outcome.checkpoint))
    assert model.dtype == torch.bfloat16
    made = model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, ids.shape[1] + 4)
    lost = export(outcome.checkpoint, format="dense", output=tmp_path / "dense", dtype="float32")
    assert lost and load(outcome.checkpoint, dtype=torch.float32, device="cpu").dtype == torch.float32


def test_a_checkpoint_has_a_model_card(called, ground):
    _, outcome = called
    text = (outcome.checkpoint / "README.md").read_text()
    bits = outcome.record.size["linear_bits_per_weight"]
    assert f"# original, {bits:.2f} bits per weight" in text and f"| {bits:.3f} |" in text
    assert "method cluscomp (" in text and "stages cluster, seed 3" in text and "base_model" not in text
    assert str(ground) not in text
    assert "README.md" in checkpoint.verify(outcome.checkpoint)
    of_hub = composed("model=llama2_7b", "bits=3", "order=[cluster,block_finetune]")
    size = Size(3.0, 2.997, 2.997, 3.2, {})
    text = card(of_hub, "cluster", size, of_hub.model.read_config(ground))
    assert "base_model: meta-llama/Llama-2-7b-hf\n" in text and "AutoModelForCausalLM" in text
    assert "# meta-llama/Llama-2-7b-hf, 3.00 bits" in text and "stages cluster, seed 0" in text


WRONG = {
    "a setting that is not there": ({"sede": 1}, ["sede", "did you mean seed"]),
    "one below a name": ({"cluster": {"sample": 1}}, ["cluster.sample", "did you mean cluster.samples"]),
    "a choice that is not there": ({"method": "gpt9"}, ["method=gpt9", "cluscomp"]),
    "a wrong type": ({"seed": "first"}, ["seed", "'first'", "integer"]),
    "a word for a number": ({"bits": "3"}, ["bits", "'3'", "number"]),
    "a value out of range": ({"bits": 9}, ["bits", "9", "8"]),
    "a stage that is not there": ({"order": ["cluster", "tune"]}, ["order", "'tune'"]),
}


@pytest.mark.parametrize(("more", "words"), WRONG.values(), ids=WRONG)
def test_settings_are_checked_as_the_command_checks_them(tiny_folder, tmp_path, more, words):
    with pytest.raises(InputError) as refusal:
        compress(tiny_folder, output_dir=tmp_path / "out", **{"bits": 3} | more)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not (tmp_path / "out").exists()


def test_models_are_named_as_people_name_them(tmp_path, small_gguf):
    with pytest.raises(InputError, match=r"model.id=.*nowhere: there is no such folder"):
        compress(tmp_path / "nowhere", bits=3, output_dir=tmp_path / "out", force=True)
    with pytest.raises(InputError, match="order: there is no stage 'tune'"):  # the model's yaml was found before
        compress("tiny", bits=3, order=["tune"])
    with pytest.raises(InputError, match="order: there is no stage 'tune'"):
        compress(small_gguf, bits=3, order=["tune"])


def test_importing_the_package_loads_no_torch():
    program = "import cluscomp, sys; print(cluscomp.__version__, 'torch' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [cluscomp.__version__, "False", "False"]
    with pytest.raises(AttributeError, match="no decompress"):
        _ = cluscomp.decompress
