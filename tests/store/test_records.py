"""Records: what is written is what is read, damage and other schemas are refused by file and key, writing is atomic."""

import json
import re

import pytest

from cluscomp.errors import InputError
from cluscomp.store.records import SCHEMA, Record, Score, content_key, protocol, read, read_sealed, write, write_sealed

SCORE = Score(
    after="original", metric="perplexity", dataset="pydoc", value=12.5, stderr=None, n=1022,
    protocol=protocol(context=512, sha256="ab"),
)  # fmt: skip


def record(**changes) -> Record:
    values = {
        "schema": SCHEMA, "run": {"name": "run-1", "seconds": {"cluster": 1.5}}, "config": {"seed": 0, "bits": None},
        "choices": {"method": {"yaml": "rtn", "differs": {"group": 64}}},
        "scores": [SCORE], "size": {"linear_bits_per_weight": 3.0}, "machine": {"device": "cpu"},
        "stages": {"cluster": {"found": {"relative_error": 0.25}}},
    }  # fmt: skip
    return Record(**values | changes)


def test_what_is_written_is_read(tmp_path):
    write(record(), tmp_path / "deep" / "record.json")
    assert read(tmp_path / "deep" / "record.json") == record()


def test_sealed_values_are_read_as_they_were_or_not_at_all(tmp_path, caplog):
    path = tmp_path / "metrics.json"
    assert read_sealed(path) is None and caplog.text == ""
    values = {"b": [1, 2.5, 0.1 + 0.2, None, True], "a": {"nested": "ä"}, "inf": float("inf")}
    write_sealed(path, values)
    assert read_sealed(path) == values | {"inf": "inf"}
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1
        path.write_bytes(altered)
        if (found := read_sealed(path)) is not None and found != values | {"inf": "inf"}:
            unnoticed.append(position)
    assert not unnoticed
    for damage in (b"", content[:-2], b"[]", b"{}", b"7", b"\xff"):
        caplog.clear()
        path.write_bytes(damage)
        assert read_sealed(path) is None and "metrics.json is damaged" in caplog.text


def test_the_file_holds_the_keys_of_the_schema(tmp_path):
    write(record(), tmp_path / "record.json")
    values = json.loads((tmp_path / "record.json").read_text())
    assert list(values) == ["schema", "run", "config", "choices", "scores", "size", "machine", "stages"]
    assert set(values["scores"][0]) == {"after", "metric", "dataset", "value", "stderr", "n", "protocol", "seen"}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_score_that_is_not_finite_survives_in_valid_json(tmp_path, value):
    """A hopeless model's perplexity is infinite; other languages' parsers refuse a bare Infinity or NaN."""
    score = Score(**vars(SCORE) | {"value": value})
    write(record(scores=[score]), tmp_path / "record.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert repr(read(tmp_path / "record.json").scores[0].value) == repr(value)


def damaged(folder, damage):
    """The path of a record that was whole until `damage` changed its values."""
    path = folder / "record.json"
    write(record(), path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda values: values.pop("scores"), "scores"),
        (lambda values: values["scores"][0].pop("n"), "n"),
        (lambda values: values["scores"][0].update(value="good"), "value"),
        (lambda values: values.update(extra=1), "extra"),
        (lambda values: values.update(schema=SCHEMA + 1), f"schema {SCHEMA + 1}"),
        (lambda values: values.update(schema=0), "schema 0"),
    ],
)
def test_a_wrong_record_is_refused_with_file_and_key(tmp_path, damage, named):
    path = damaged(tmp_path, damage)
    with pytest.raises(InputError, match=rf"(?s)record\.json.*{named}"):
        read(path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, content):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"record\.json"):
        read(path)


def test_an_older_schema_is_told_from_damage(tmp_path):
    """A record of another schema has other keys; what is wrong with it is its schema, not those."""
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"schema": 0, "results": []}))
    with pytest.raises(InputError, match=f"schema 0; this version reads {SCHEMA}.*command.convert {tmp_path} "):
        read(path)


def test_a_failed_write_leaves_the_old_record_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    write(record(), path)
    before = path.read_bytes()

    class Unprintable:
        def __str__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(record(config={"a": Unprintable()}), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_every_field_counts_in_a_protocols_hash():
    base = {"context": 512, "sha256": "ab", "dtype": "float32", "partial": False}
    hashes = {protocol(**base)["hash"]}
    for changes in ({"context": 511}, {"sha256": "ac"}, {"dtype": "bfloat16"}, {"partial": True}, {"stride": 512}):
        hashes.add(protocol(**base | changes)["hash"])
    assert len(hashes) == 6
    assert protocol(**dict(reversed(base.items())))["hash"] == protocol(**base)["hash"]
    assert protocol(**base) == base | {"hash": content_key(base)}


def test_a_record_of_before_scores_told_what_was_seen_is_read(tmp_path):
    write(record(), tmp_path / "record.json")
    values = json.loads((tmp_path / "record.json").read_text())
    for row in values["scores"]:
        del row["seen"]
    (tmp_path / "record.json").write_text(json.dumps(values))
    assert read(tmp_path / "record.json") == record()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda values: values["config"].update(order=["cluster", "tune"]), "config.order: there is no stage 'tune'"),
        (lambda values: values["scores"][0].update(after="recover"), "scores: there is no stage 'recover'"),
        (lambda values: values["stages"].update({"../x": {}}), "stages: '../x' is no name"),
        (lambda values: values["run"].update(key="../../x"), "run.key: '../../x' is no name"),
        (lambda values: values["run"].update(experiment=".."), "run.experiment: '..' is no name"),
        (lambda values: values["run"].update(name="a\x1b[2J"), "run.name: "),
    ],
)
def test_stages_that_are_not_there_and_names_that_leave_a_folder_are_told(tmp_path, damage, named):
    """Records of others become tables, and are copied to files that they name."""
    path = damaged(tmp_path, damage)
    with pytest.raises(InputError, match=rf"record\.json: .*{re.escape(named)}"):
        read(path)
