"""Models that another program compressed: scored under our protocol, with the bits their makers state."""

import json

import pytest
import torch
from runs import pipeline
from transformers import AutoTokenizer

from cluscomp import report, tables
from cluscomp.checkpoint import load
from cluscomp.errors import InputError
from cluscomp.models import compressed
from cluscomp.records import read, write
from cluscomp.sources import ExternalModel

SMALL = ["data=text", "evaluate.context=32", "evaluate.limit=4"]
STATED = {"original": "tiny-llama", "method": "GPTQ", "bits": 3.3, "bytes": 12345, "made": "otherprogram 1.0"}


@pytest.fixture(scope="module")
def made(ground):
    """A run of round-to-nearest, one of the plain numbers of its checkpoint as an external model, and their folder."""
    places = [f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", f"outputs={ground / 'outputs'}"]
    ours = pipeline(*SMALL, *places, "model=tiny", "method=rtn", "bits=4", "order=[cluster]")
    folder = ground / "theirs"
    model = load(ours.checkpoint)
    for name, layer in compressed(model).items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data = layer.stored(torch.float32).detach()
        model.set_submodule(name, linear)
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ours.checkpoint).save_pretrained(folder)
    (folder / "external.json").write_text(json.dumps(STATED))
    theirs = pipeline(*SMALL, *places, "model=external", f"model.id={folder}", "order=[evaluate]")
    return ours.record, theirs.record, folder


def test_plain_numbers_score_as_the_stored_form_they_stand_for(made):
    ours, theirs, _ = made
    expected = {(score.dataset, score.metric): score for score in ours.scores if score.after == "cluster"}
    assert theirs.scores and {score.after for score in theirs.scores} == {"external"}
    for score in theirs.scores:
        same = expected[score.dataset, score.metric]
        assert score.value == pytest.approx(same.value, rel=1e-4) and score.protocol == same.protocol


def test_tables_show_what_is_stated_and_say_so(made, tmp_path):
    ours, theirs, _ = made
    write(theirs, tmp_path / "theirs.json")
    theirs = read(tmp_path / "theirs.json")
    assert tables.limit(theirs) == "3.3" and tables.model_name(theirs) == "tiny-llama"
    ((_, table), *_) = report.views([theirs])
    row = table.iloc[0]
    assert (row["method"], row["stored bits"], row["MB"]) == ("GPTQ (external)", 3.3, 0.0)
    text = report.page("both", [ours, theirs], "md")["tables.md"]
    assert "GPTQ (external)" in text and "those it states" in text and "RTN" in text
    points = tables.scores([ours, theirs])
    assert set(points["after"]) == {"original", "cluster", "external"}


def test_nothing_is_done_to_an_external_model(made, ground):
    _, _, folder = made
    with pytest.raises(InputError, match=r"order=\['cluster'\]: model=external is only scored"):
        pipeline("model=external", f"model.id={folder}", "method=rtn", "bits=4", "order=[cluster]")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"bits": 0}, "bits: .*greater than 0"), ({"method": ""}, "method: "), ({"bit": 3}, "bit: ")],
)
def test_a_wrong_statement_is_named(made, tmp_path, change, said):
    _, _, folder = made
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "external.json").unlink()
    with pytest.raises(InputError, match=r"external\.json is missing; it says what the folder is"):
        ExternalModel(id=str(tmp_path)).folder(tmp_path)
    (tmp_path / "external.json").write_text(json.dumps(STATED | change))
    with pytest.raises(InputError, match=said):
        ExternalModel(id=str(tmp_path)).folder(tmp_path)
