"""verify: a record whose model is measured again, or made again, is equal; what differs is told with its reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_files import llama
from pipelines import composed
from safetensors.torch import load_file

from cluscomp import __main__ as command
from cluscomp.errors import InputError
from cluscomp.runs.experiment import config_of
from cluscomp.runs.verify import changed, checkpoint_of, compare, explained, overall, quoted
from cluscomp.store.records import Score, protocol, read

Q8_0 = GGMLQuantizationType.Q8_0
TINY = [
    "model=tiny", "data=text", "data.file=text.txt", "method.vector_dim=4", "method.codebook_size=16",
    "evaluate.context=32", "evaluate.limit=2", "cluster.samples=4", "cluster.length=32", "name=tiny",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which a tiny run is finished, through the command line."""
    place = tmp_path_factory.mktemp("verify")
    text = [f"Paragraph {i} says that the quick brown fox jumped {7 * i} times." for i in range(60)]
    (place / "text.txt").write_text("\n\n".join(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CLUSCOMP_CACHE", str(place / "cache"))
        patch.setattr("sys.argv", ["cluscomp", *TINY])
        command.main()
        yield place


def verify(made, capsys, *arguments: str) -> tuple[int, str]:
    (path,) = made.glob("outputs/run-*/record.json")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["cluscomp", "verify", str(path.relative_to(made)), *arguments])
        command.main()
    found = capsys.readouterr()
    return ended.value.code, found.out + found.err


@pytest.mark.parametrize("how", [[], ["full=true"]])
def test_a_record_of_this_machine_is_equal(made, capsys, how):
    code, said = verify(made, capsys, *how)
    assert code == 0 and ": equal\n" in said and "not as it was" not in said
    assert said.count("| equal ") == 4  # perplexity and bits a byte of the original and the compressed model
    assert all(len(line) <= 80 for line in said.splitlines() if line.startswith("|"))
    assert not list(made.glob("outputs/verify-*"))


@pytest.mark.parametrize("argument", ["full", "full=yes"])
def test_what_is_no_word_for_full_is_refused(made, capsys, argument):
    code, said = verify(made, capsys, argument)
    assert code == 2 and argument in said


def test_true_is_written_as_hydra_takes_it(made, capsys, caplog):
    code, _ = verify(made, capsys, "full=True")
    assert code == 0 and "all is made anew" in caplog.text


def test_the_original_is_scored_with_the_numbers_that_the_run_began_with(tmp_path, capsys, monkeypatch):
    """A quantised GGUF file's own are more exact than those in 16 bits that stages begin with."""
    rng = np.random.default_rng(0)

    def eight_bits(rows: int, width: int, name: str):
        return quants.quantize(rng.normal(size=(rows, width)).astype(np.float32), Q8_0), Q8_0

    llama(tmp_path / "small.gguf", matrix=eight_bits)
    (tmp_path / "text.txt").write_text("\n\n".join("ab" * (3 + i % 5) + "a" * (i % 7) for i in range(80)))
    monkeypatch.chdir(tmp_path)
    settings = ["model=gguf", "model.file=small.gguf", "method=rtn", "bits=4", "evaluate.context=16", "cache=cache"]
    monkeypatch.setattr("sys.argv", ["cluscomp", *settings, "data=text", "data.file=text.txt"])
    command.main()
    model = composed(*settings, "data=text", "data.file=text.txt").model
    exact, begun = (load_file(model.folder(Path("cache"), to_score=one) / "model.safetensors") for one in (True, False))
    assert any((exact[name] != begun[name].float()).any() for name in begun)  # order=[evaluate] alone scores the first
    code, said = verify(tmp_path, capsys)
    assert code == 0 and ": equal\n" in said


def test_a_path_may_hold_an_equals_sign(made, capsys):
    """Lightning's epoch=3-step=99: of the record, which is a file, and of a folder."""
    (path,) = made.glob("outputs/run-*/record.json")
    (made / "epoch=3").mkdir()
    shutil.copy(path, made / "epoch=3" / "record.json")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["cluscomp", "verify", "epoch=3/record.json"])
        command.main()
    assert ended.value.code == 0 and ": equal\n" in capsys.readouterr().out


def test_an_altered_score_is_different(made, capsys):
    (path,) = made.glob("outputs/run-*/record.json")
    whole = path.read_text()
    values = json.loads(whole)
    values["scores"][0]["value"] *= 1.01
    values["machine"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(values))
    try:
        code, said = verify(made, capsys)
    finally:
        path.write_text(whole)
    assert code == 1 and ": different\n" in said and "(then 1.0)" in said
    score = json.loads(whole)["scores"][0]
    told = f"{score['metric']} of text after original: {score['value']!r}, recorded {score['value'] * 1.01!r}\n"
    assert told in said  # all digits, where the table has eight


def test_a_checkpoint_that_is_gone_is_told(made, capsys):
    (stage,) = made.glob("outputs/cluster-*")
    stage.rename(made / "aside")
    try:
        code, said = verify(made, capsys)
    finally:
        (made / "aside").rename(stage)
    assert code == 2 and "no finished stage cluster holds the checkpoint" in said and "full=true" in said


def test_without_its_cell_a_record_needs_its_overrides(made, capsys):
    shutil.copytree(made / "outputs" / "cells", made / "cells")
    shutil.rmtree(made / "outputs" / "cells")
    try:
        code, said = verify(made, capsys)
        assert code == 2 and "give outputs=FOLDER" in said
        code, said = verify(made, capsys, *TINY)
        assert code == 0 and ": equal\n" in said
    finally:
        shutil.copytree(made / "cells", made / "outputs" / "cells")


def test_what_changed_is_named(made):
    record = read(next(made.glob("outputs/run-*/record.json")))
    now = config_of(composed(*TINY, "seed=1"))
    machine = record.machine | {"device": "cuda"}
    assert changed(record, now, machine) == ["seed = 1 (then 0)", "device = cuda (then cpu)"]
    assert checkpoint_of(record, "original", made / "outputs") is None
    with pytest.raises(InputError, match="no finished stage"):
        checkpoint_of(record, "cluster", made)


def score(value: float, n: int = 100, **fields) -> Score:
    return Score(after="cluster", metric="m", dataset="d", value=value, stderr=None, n=n, protocol=protocol(**fields))


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        (score(10.0), score(10.0), "equal"),
        (score(10.0), score(10.009), "within tolerance"),
        (score(10.0), score(10.011), "different"),
        (score(0.5, task_hash="a"), score(0.51, task_hash="a"), "within tolerance"),  # one of a hundred answers
        (score(0.5, task_hash="a"), score(0.52, task_hash="a"), "different"),
        (score(0.5), score(0.51), "different"),
    ],
)
def test_verdicts_by_hand(then, now, verdict):
    assert overall(compare([then], [now])) == verdict


def test_the_protocols_difference_is_the_reason():
    (found,) = compare([score(1.0, device="cpu")], [score(2.0, device="cuda")])
    assert found.reasons == ("device=cuda (then device=cpu)",)
    assert explained([found, found])[1:] == [
        "m of d after cluster: 2.0, recorded 1.0",
        "the protocol has device=cuda (then device=cpu)",
    ]


@pytest.mark.parametrize("text", [r"\frac{1}", "a\\b", "ends\\", "\\'quoted\\'", "two\\\\", "it's", "", "a 'b' \\\\'"])
def test_any_text_arrives_as_it_is(text):
    assert composed("model=tiny", "bits=3", f"evaluate.prompt={quoted(text)}").evaluate.prompt == text


def test_any_path_is_a_value_for_hydra(tmp_path):
    path = f"{tmp_path}/a b/it's=x,[1]{{y}}"
    Path(path).mkdir(parents=True)
    assert (
        composed("model=hub", f"model.id={quoted(path)}", "order=[evaluate]", "data=text", "data.file=t").model.id
        == path
    )
