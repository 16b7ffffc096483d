"""What settings take from the environment is used and never written: every file a run leaves is searched for it."""

import json
import sys

import pytest
from pipelines import composed

from cluscomp.__main__ import main
from cluscomp.errors import InputError
from cluscomp.runs.experiment import config_of, stage_keys
from cluscomp.store.records import protocol, read
from cluscomp.store.secrets import hide, unread

VALUES = {  # of all kinds; the names are not those of secrets
    "API": "sk-0123456789abcdefghij", "TOKENS": "hf_abcdefghijklmnopqrstu", "PASS": "correct horse battery",
    "PLAIN": "plain-value-of-a-name", "X": "xxyyzz", "lower": "hunter2", "UMLAUT": "schlüssel-wörter-€",
    "QUOTES": "it's \"quoted\" here", "BACKSLASH": "back\\slash\\value", "LINES": "-----BEGIN\nKEY\n-----END",
    "TAB": "tab\tin\tthe value", "JSON": '{"token": "in-a-json-value"}', "ADDRESS": "https://me:word-in-it@host/x",
    "SHORT": "pin4", "DIGITS": "918273645546372", "SPACES": "  value with spaces  ", "PERCENT": "per%20cent%s{}",
    "REGEX": "a+b(c)*[d]?.^$", "DOLLAR": "cost$${x}-value", "PATHS": "/one/two:/three/four",
}  # fmt: skip
FILE, SEED = "-".join(["name", "of", "a", "file"]), str(74839200 + 1)  # a capsule holds this source, too
ALL = "|".join(f"${{oc.env:CASE_{name}}}" for name in VALUES)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder in which the command is given, and the variables."""
    for name, value in VALUES.items():
        monkeypatch.setenv(f"CASE_{name}", value)
    secret = tmp_path / f"{FILE}.txt"
    secret.write_text("\n\n".join(f"Paragraph {i} says that {i * i} is a square." for i in range(60)))
    monkeypatch.setenv("CASE_FILE", str(secret))
    monkeypatch.setenv("CASE_SEED", SEED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = [
    "model=tiny", "data=text", "data.file=${oc.env:CASE_FILE}", "method=cluscomp_data_free", "method.vector_dim=4",
    "method.codebook_size=8", "method.iterations=2", "evaluate.context=32", "evaluate.limit=2", "device=cpu",
    "cache=cache", "seed='${oc.decode:${oc.env:CASE_SEED}}'",
]  # fmt: skip


def left(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_twenty_kinds_of_values_stand_in_no_file_that_a_run_leaves(place, monkeypatch, capsys):
    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["cluscomp", *RUN, *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert command(f"evaluate.prompt='{ALL}'", "tracker=tensorboard") == 0, capsys.readouterr().err
    assert command(f"data.file='{ALL}'") == 2  # which is told in cell.json and its log
    said = capsys.readouterr()
    secrets = [*VALUES.values(), FILE, SEED]
    forms = {form for one in secrets for form in (one, json.dumps(one)[1:-1], repr(one)[1:-1])}
    files = left(place / "outputs") | {"terminal": (said.out + said.err).encode()}
    for kind in ("tfevents", "capsule-", "cell.json", "metrics.json", "record.json", "log.txt"):
        assert any(kind in name for name in files), kind
    found = [(form, name) for form in forms for name, content in files.items() if form.encode() in content]
    assert not found
    (path,) = place.glob("outputs/run-*/record.json")
    record = read(path)
    assert record.config["seed"] == "${oc.decode:${oc.env:CASE_SEED}}" and record.config["evaluate"]["prompt"] == ALL
    assert record.config["stages"]["cluster"]["data"]["file"] == "${oc.env:CASE_FILE}"


def test_keys_are_those_of_the_values_and_records_those_of_the_interpolations(place, monkeypatch):
    def made() -> tuple:
        experiment = composed(*RUN)
        return stage_keys(experiment, {}), config_of(experiment)

    first, again = made(), made()
    monkeypatch.setenv("CASE_SEED", "74839202")
    other = made()
    assert first == again and other[0] != first[0] and other[1] == first[1]
    given = composed(*RUN[:-1], "seed=74839202")
    assert stage_keys(given, {}) == other[0]  # a value counts, not where it is from
    monkeypatch.setenv("CASE_SEED", "not-a-number-of-mine")
    with pytest.raises(InputError, match=r"^seed = \$\{oc\.decode:.*integer") as told:
        composed(*RUN)
    assert "not-a-number" not in str(told.value)


def test_what_has_to_be_written_cannot_come_from_the_environment(place):
    for setting in ("name", "data.name", "model.config.hidden_size", "model.architecture", "order", "evaluate.after"):
        with pytest.raises(InputError, match=rf"^{setting} = \$\{{oc\.env:CASE_API\}}: is written as it is"):
            composed(*RUN, f"{setting}=${{oc.env:CASE_API}}")
    for setting in ("project", "entity"):
        with pytest.raises(InputError, match="is written as it is"):
            composed(*RUN, "tracker=wandb", f"tracker.{setting}=${{oc.env:CASE_API}}")


def test_values_of_earlier_settings_are_forgotten_and_names_of_ours_stay(place):
    composed(*RUN, "evaluate.prompt=${oc.env:CASE_PLAIN}")
    text = VALUES["PLAIN"]
    assert hide(text) == "${oc.env:CASE_PLAIN}" == unread([text])[0] == protocol(text=text)["text"]
    assert unread({"after": text, "protocol": {"text": text}}) == {"after": text, "protocol": {"text": text}}
    composed(*RUN)
    assert hide(text) == text
