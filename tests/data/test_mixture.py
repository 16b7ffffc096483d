"""Mixtures: shares of characters, also at the end that is held out; and the original's own samples among them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pipelines import composed, pipeline
from test_texts import hub, mirror
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from cluscomp.command.compose import CONF
from cluscomp.data.mixture import Mixture
from cluscomp.data.overlap import DOMAINS, same_domain
from cluscomp.data.own import OwnSamples
from cluscomp.data.texts import PydocText, split
from cluscomp.errors import InputError
from cluscomp.models.sources import HubModel
from cluscomp.report.learned import learned_from
from cluscomp.runs.experiment import stage_keys


def mixture(parts, shares, **changes) -> Mixture:
    return Mixture(**{"name": "mixture", "parts": parts, "shares": shares, "separator": "\n\n"} | changes)


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> dict[str, object]:
    """Two texts of rows of ten characters, one of them three times as long."""
    folder = tmp_path_factory.mktemp("letters")
    lengths = {"a": 300, "b": 100}
    made = {}
    for letter, count in lengths.items():
        rows = [f"{letter}{number:09}" for number in range(count)]
        root = mirror(folder / letter, train=rows, test=[f"{letter} {number}" for number in range(9)])
        made[letter] = hub(name=letter, domain=letter, data_root=root)
    return made


def test_shares_are_of_characters_and_hold_for_the_end_as_for_the_whole(letters):
    found = mixture(letters, [0.4, 0.6]).text("calibration")
    counts = {letter: sum(row[0] == letter for row in found.rows) for letter in letters}
    assert counts["b"] == 100 and counts["a"] == pytest.approx(67, abs=1)  # b is the scarcest
    for letter in letters:
        assert (rows := [row for row in found.rows if row[0] == letter]) == sorted(rows)
    end = split(found, 0.1)[1].rows
    assert sum(row[0] == "b" for row in end) / len(end) == pytest.approx(0.6, abs=0.07)
    turns = "".join(row[0] for row in found.rows)
    assert turns.count("ab") == 10  # of ten runs each
    assert found.name == "0.4 org/name/train + 0.6 org/name/train"
    assert {row[0] for row in mixture(letters, [0.4, 0.6]).text("test").rows} == {"a", "b"}


def test_other_shares_and_other_texts_are_other_texts(letters):
    found = [mixture(letters, shares).text("calibration") for shares in ([0.4, 0.6], [0.5, 0.5])]
    assert found[0].sha256 != found[1].sha256
    assert mixture(letters, [0.4, 0.6]).text("calibration").sha256 == found[0].sha256


def test_a_mixture_has_the_domains_of_all_its_parts(letters):
    domain = mixture(letters, [0.5, 0.5]).domain
    assert same_domain(domain, "a") and same_domain("b", domain) and not same_domain(domain, "ab")


def test_shares_that_do_not_add_up_and_parts_that_are_none_are_refused(letters, tmp_path):
    for shares, words in (([0.5, 0.6], r"add up to 1\.1; each above 0, and 1 in all"), ([1.5, -0.5], "each above 0")):
        with pytest.raises(ValueError, match=words):
            mixture(letters, shares)
    with pytest.raises(ValueError, match=r"shares: \[1.0\] are not one for each of the parts a, b"):
        mixture(letters, [1.0])
    with pytest.raises(
        InputError, match=r"data: shares: \[0.5, 0.5\] are not one for each of the parts first, second, third"
    ):
        composed("bits=3", "data=mixture", "+data@data.parts.third=ptb")
    with pytest.raises(ValueError, match="parts: two texts at least make a mixture"):
        mixture({"a": letters["a"]}, [1.0])
    blank = hub(data_root=mirror(tmp_path, train=["", ""], test=["one"]))
    with pytest.raises(InputError, match=r"org/name/train: there is no text in it, so it can have no share of mixture"):
        mixture(letters | {"b": blank}, [0.5, 0.5]).text("calibration")


def test_a_data_set_has_one_domain_however_it_is_named():
    """By its yaml, by its id on the hub, by a path in a mirror."""
    told = [yaml.safe_load(path.read_text()) for path in (CONF / "data").glob("*.yaml")]
    named = {one["id"]: one["domain"] for one in told if one["_target_"].endswith("HubText")}
    assert named == DOMAINS
    for id, domain in named.items():
        assert same_domain(id, domain) and same_domain(domain, f"/mirror/{id}/train.parquet") and same_domain(id, id)
        assert same_domain(f"pydoc + {id}", domain) and not same_domain(f"my{id}", domain)
    assert same_domain("org/name", "org/name") and not same_domain("org/name", "c4")


def test_a_file_has_one_domain_however_its_place_is_told(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for told in ("rows.jsonl", "./rows.jsonl", f"../{tmp_path.name}/rows.jsonl"):
        assert same_domain(told, str(tmp_path / "rows.jsonl")) and same_domain(f"0.5 + {told}", "rows.jsonl")
    assert not same_domain("rows.jsonl", str(tmp_path / "other.jsonl"))


def test_half_of_what_is_learned_from_are_the_originals_own_samples(tmp_path):
    """Written once, told in record and table; the text that is scored is another part's."""
    own = ["data.parts.own.documents=10", "data.parts.own.length=64", "data.parts.own.batch_size=5"]
    settings = [
        "model=tiny", "model.config.num_hidden_layers=1", "data=half_own", "data@scored=pydoc", *own,
        f"outputs={tmp_path / 'outputs'}", f"cache={tmp_path / 'cache'}", "method.vector_dim=4",
        "method.codebook_size=16", "cluster.samples=2", "cluster.length=32", "order=[cluster,recover]",
        "recover=quick", "recover.tokens=256", "recover.length=32", "recover.batch_size=2", "recover.held_out=2",
        "evaluate.context=64", "evaluate.limit=2",
    ]  # fmt: skip
    record = pipeline(*settings).record
    assert learned_from(record, "recover") == "0.5 pydoc + 0.5 own"
    seen = next(row.seen for row in record.scores if row.after == "recover")
    assert seen["recover"]["in_domain"] and seen["recover"]["text"] == "0.5 pydoc/calibration + 0.5 own/calibration"
    (written,) = (tmp_path / "cache").glob("own-*.jsonl")
    before, experiment = written.stat().st_mtime_ns, composed(*settings)
    source = experiment.stages["recover"].data
    text = source.text("calibration")
    assert 0.4 < sum(map(len, text.rows[1::2])) / sum(map(len, text.rows)) < 1
    assert written.stat().st_mtime_ns == before
    other = composed(*settings, "data.parts.own.seed=1")
    root = {"model": "the same"}
    assert stage_keys(other, root)["recover"] != stage_keys(experiment, root)["recover"]
    assert len([*(tmp_path / "cache").glob("own-*.jsonl")]) == 2


def sampled(folder, cache, **changes) -> OwnSamples:
    """Ten samples of a model in a folder, by two."""
    usual = {"documents": 10, "length": 12, "temperature": 1.0, "batch_size": 2, "seed": 3}
    return OwnSamples(
        name="own", model=HubModel(id=str(folder), revision=None, config=None), cache=str(cache), **usual | changes
    )


def test_own_samples_begin_as_the_model_goes_on_after_its_first_token(families, tmp_path):
    """Of a model whose BOS is not its EOS, too: by the likeliest tokens, found one by one."""
    folder = tmp_path / "model"
    shutil.copytree(families("llama", initializer_range=0.5), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="!")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.bos_token_id]])
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    source = sampled(folder, tmp_path / "cache", documents=1, length=8, temperature=1e-4, batch_size=1)
    assert source.text("calibration").rows == [tokenizer.decode(ids[0], skip_special_tokens=True)]


def test_own_samples_are_of_the_models_predictions_alone(families, tmp_path):
    """What its generation_config.json says of penalties is left out; a text longer than the model takes is refused."""
    folder = tmp_path / "model"
    shutil.copytree(families("llama", initializer_range=0.5), folder)
    plain = sampled(folder, tmp_path / "cache").text("calibration").rows
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "min_p": 0.2}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert sampled(folder, tmp_path / "other").text("calibration").rows == plain
    most = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(InputError, match=f"length={most + 1}: model has {most} positions"):
        sampled(folder, tmp_path / "cache", length=most + 1).text("calibration")


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import GenerationMixin
sys.path += sys.argv[1:2]
from test_mixture import sampled

generate, batches = GenerationMixin.generate, []

def counted(*arguments, **settings):
    batches.append(1)
    if len(batches) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(*arguments, **settings)

GenerationMixin.generate = counted
sampled(*map(Path, sys.argv[2:])).text("calibration")
"""


def test_own_samples_go_on_after_a_kill_to_the_same_text(families, tmp_path, monkeypatch):
    """Batches that were written stand; half a line of the next one, as a full disk leaves it, goes."""
    folder, killed = families("llama"), tmp_path / "killed"
    script = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder), str(killed)]
    path = os.pathsep.join(map(str, sys.path))
    ended = subprocess.run(script, env=os.environ | {"PYTHONPATH": path}, check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (parts,) = killed.glob("own-*.parts")
    assert parts.read_bytes().count(b"\n") == 3 and not [*killed.glob("own-*.jsonl")]
    with parts.open("ab") as file:
        file.write(b'{"texts": ["ha')
    whole = sampled(folder, tmp_path / "whole").text("calibration")
    generate, batches = GenerationMixin.generate, []
    monkeypatch.setattr(GenerationMixin, "generate", lambda *a, **b: batches.append(1) or generate(*a, **b))
    assert sampled(folder, killed).text("calibration").sha256 == whole.sha256
    assert len(batches) == 2 and len(set(whole.rows)) > 5
    assert [path.suffix for path in killed.glob("own-*") if path.suffix != ".lock"] == [".jsonl"]
    assert sampled(folder, tmp_path / "whole", seed=4).text("calibration").sha256 != whole.sha256


def test_own_samples_are_not_scored(tmp_path):
    experiment = composed("model=tiny", "bits=3", "data=own", f"cache={tmp_path}")
    with pytest.raises(InputError, match=r"data own: what the model itself writes .* data@scored=pydoc"):
        experiment.evaluate.inputs()
    assert not [*tmp_path.glob("own-*")]
    assert PydocText(name="pydoc").text("test").rows
