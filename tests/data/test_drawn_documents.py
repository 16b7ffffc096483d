"""Documents drawn from a stream: of a mirror, a folder and a file, by seed; and what is told of bad ones."""

import json
import time
from pathlib import Path

import pytest
from pipelines import composed
from test_texts import LONG, mirror

from cluscomp.data.documents import Documents
from cluscomp.errors import InputError


def documents(**changes) -> Documents:
    values = {
        "name": "some", "domain": "some", "id": "org/name", "revision": None, "config": None, "files": None,
        "calibration": "train", "test": None, "column": "text", "documents": None, "seed": 0, "separator": "\n\n",
        "data_root": None,
    }  # fmt: skip
    return Documents(**values | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """A mirror of a data set with 50 rows of text among blank ones."""
    rows = [f"document {number}" if number % 6 else ("" if number % 4 else None) for number in range(60)]
    return mirror(tmp_path_factory.mktemp("hub"), train=rows, dev=[LONG, "one"])


def test_so_many_rows_are_drawn_by_seed_and_the_last_fifth_is_test_text(root):
    whole = documents(data_root=root)
    rows = whole.text("calibration").rows + whole.text("test").rows
    assert rows == [f"document {number}" for number in range(60) if number % 6]
    assert len(whole.text("test").rows) == 10
    few = documents(data_root=root, documents=20)
    drawn = few.text("calibration").rows + few.text("test").rows
    assert len(few.text("calibration").rows) == 16 and len({*drawn}) == 20 and {*drawn} < {*rows}
    assert drawn != sorted(drawn, key=rows.index)
    assert few.text("calibration").sha256 == documents(data_root=root, documents=20).text("calibration").sha256
    other = documents(data_root=root, documents=20, seed=1)
    assert other.text("calibration").sha256 != few.text("calibration").sha256
    assert few.text("calibration").name == "org/name/train" and few.text("test").name == "org/name/train (end)"


def test_a_split_of_its_own_for_the_test_and_more_documents_than_there_are(root, caplog):
    source = documents(data_root=root, test="dev", documents=500, seed=3)
    assert {*source.text("test").rows} == {LONG, "one"} and len(source.text("calibration").rows) == 50
    assert "has 50 rows of text, all of which are taken for data.documents=500" in caplog.text


def test_a_file_and_a_folder_are_read_like_the_hub(root, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"row {number}", "id": number}) + "\n" for number in range(10)))
    assert documents(id=str(path), column="body").text("calibration").rows == [f"row {number}" for number in range(8)]
    path.write_text('{"body": "another"}\n{"body": "file"}\n')
    assert documents(id=str(path), column="body").text("test").rows == ["file"]
    assert (
        documents(id=f"{root}/org/name").text("calibration").rows == documents(data_root=root).text("calibration").rows
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"column": "body"}, r"=org/name, data.calibration=train, row 0: has no column 'body'; its columns are text$"),
        ({"calibration": "validation"}, r"data.calibration=validation: Bad split: .* Available splits: .*train.*dev"),
        ({"config": "english"}, "english"),
        ({"id": "org/other"}, "data_root=.*: no folder org/other in it$"),
        ({"id": "org/nam"}, r"data_root=.*: no folder org/nam in it; did you mean org/name\?$"),
        ({"id": "name"}, r"data_root=.*: no folder name in it; did you mean org/name\?$"),
        ({"files": ["*.csv"]}, r"data.calibration=train, data.files=\['\*.csv'\]: No \(supported\) data files found"),
        ({"revision": "v2"}, "data.revision=v2: of the hub alone, and .*org/name is not on it; leave it out$"),
        ({"data_root": None, "id": "rows.csv"}, r"data.id=rows.csv: there is no such file$"),
        ({"data_root": None}, r"data.calibration=train: cannot be read \(.*\). Without network give data_root=FOLDER"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(root, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        documents(**{"data_root": root} | changes).text("calibration")
    assert "\n" not in str(caught.value)


def test_without_network_that_is_told_at_once(root, monkeypatch):
    """`datasets` by itself tries for one and a half minutes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *told, **more: (_ for _ in ()).throw(OSError("no network")))
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"=train: cannot be read \(.*\). Without network give data_root"):
        documents().text("calibration")
    assert time.monotonic() - begun < 10


def test_a_data_set_of_several_configurations_names_them(root):
    (Path(root) / "two" / "en").mkdir(parents=True)
    (Path(root) / "two" / "de").mkdir()
    for name in ("en", "de"):
        (Path(root) / "two" / name / "train.jsonl").write_text('{"text": "one"}\n')
    told = "configs: [{config_name: en, data_files: en/*}, {config_name: de, data_files: de/*}]"
    (Path(root) / "two" / "README.md").write_text(f"---\n{told}\n---\n")
    with pytest.raises(InputError, match=r"Config name is missing.*'en', 'de'.*") as caught:
        documents(data_root=root, id="two").text("calibration")
    assert "\n" not in str(caught.value)


def test_rows_without_text_and_one_split_for_both_are_refused(tmp_path):
    root = mirror(tmp_path, train=["", None, " "], dev=["one"])
    with pytest.raises(InputError, match="none of 3 rows has text in column 'text'"):
        documents(data_root=root).text("calibration")
    with pytest.raises(InputError, match=r"one row of text cannot be split into two texts; give data.test"):
        documents(data_root=root, calibration="dev").text("test")
    with pytest.raises(InputError, match=r"data.calibration=numbers, row 0: column 'text' holds int, no text"):
        documents(data_root=mirror(tmp_path / "other", numbers=[3, 4]), calibration="numbers").text("test")
    with pytest.raises(ValueError, match=r"data\.calibration and data\.test are both 'dev'"):
        documents(calibration="dev", test="dev")


def test_one_setting_chooses_another_text_to_score(root):
    experiment = composed("bits=3", "data=hub", "data.id=org/name", f"data_root={root}", "data@scored=pydoc")
    assert [one.name for one in experiment.evaluate.texts.values()] == ["pydoc"]
    assert experiment.stages["cluster"].data == documents(
        name="org/name", domain="org/name", data_root=root, documents=2000
    )
    assert experiment.choices["data@scored"] == {"yaml": "pydoc", "differs": {}}
    (same,) = composed("bits=3", "data=hub", "data.id=org/name").evaluate.texts.values()
    assert same.id == "org/name"


def test_c4_from_the_shared_mirror(shared):
    source = documents(
        id="allenai/c4-sample", config="en", test="validation", documents=30, data_root=str(shared / "data" / "hub")
    )
    assert len(source.text("test").rows) == 30 and 0 < len(source.text("calibration").rows) <= 30
