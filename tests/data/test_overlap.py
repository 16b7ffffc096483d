"""What of a test text was seen before: sequences of words counted by hand, and a run that marks its scores."""

import random
from pathlib import Path

import pytest
from pipelines import pipeline

from cluscomp.data.overlap import WORDS, overlap, sequences
from cluscomp.report.tables import stage_table
from cluscomp.store.records import read


def words(first: int, last: int) -> str:
    return " ".join(f"word{number}" for number in range(first, last))


def test_sequences_by_hand():
    """20 words have 8 runs of 13; case, line breaks and punctuation do not count; 12 words have none."""
    assert len(sequences(words(0, 20))) == 8
    assert sequences("A " + words(0, 12)) == sequences("a,\n" + words(0, 12).upper() + ".")
    assert sequences(words(0, WORDS - 1)) == set()


@pytest.mark.parametrize(
    ("seen", "share"),
    [
        ([words(0, 40)], 1.0),
        ([words(100, 140)], 0.0),
        ([words(0, 20)], 8 / 28),  # of the 28 runs of the 40 words
        ([words(0, 20), words(0, 20)], 8 / 28),
        ([words(0, 13), words(27, 40)], 2 / 28),
        ([words(0, 12), words(12, 24)], 0.0),
        ([], 0.0),
    ],
)
def test_overlap_by_hand(seen, share):
    assert overlap([words(0, 40)], seen) == pytest.approx(share)
    assert overlap([words(0, 40), words(0, 40)], seen) == pytest.approx(share)  # each run counts once
    assert overlap([], seen) == 0.0


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A text to learn from, whose beginning also stands in another one."""
    folder = tmp_path_factory.mktemp("texts")
    make = random.Random(0)
    rows = [" ".join("".join(make.choices("abcdefgh", k=5)) for _ in range(20)) for _ in range(120)]
    (folder / "learned.txt").write_text("\n\n".join(rows[:60]))
    (folder / "known.txt").write_text("\n\n".join(rows[:48]))
    (folder / "new.txt").write_text("\n\n".join(rows[60:]))
    return folder


def test_a_run_marks_what_its_stages_learned_from(texts, tmp_path):
    """A data-free stage has seen nothing; windows all over a text have seen most of its copy, and none of another."""
    other = [
        part
        for name in ("known", "new")
        for part in (
            f"+data@evaluate.texts.{name}=text", f"evaluate.texts.{name}.name={name}",
            f"evaluate.texts.{name}.file={texts / 'new.txt'}", f"evaluate.texts.{name}.test_file={texts / name}.txt",
        )
    ]  # fmt: skip
    command = [
        "model=tiny", "model.config.num_hidden_layers=1", "data=text",
        f"data.file={texts / 'learned.txt'}", *other, "method.vector_dim=4",
        "method.codebook_size=16", "evaluate.context=128", f"outputs={tmp_path / 'outputs'}",
        f"cache={tmp_path / 'cache'}", "order=[cluster,block_finetune]", "block_finetune=quick", "cluster.samples=1",
        "cluster.length=64", "block_finetune.samples=128", "block_finetune.length=256", "block_finetune.epochs=1",
    ]  # fmt: skip
    record = read(pipeline(*command).path)
    found = {(row.after, row.dataset): row.seen for row in record.scores if row.metric == "perplexity"}
    assert found["original", "text"] == {} and set(found["cluster", "known"]) == {"cluster"}
    seen = {name: found["block_finetune", name]["block_finetune"] for name in ("text", "known", "new")}
    assert [seen[name]["in_domain"] for name in seen] == [True, False, False]
    assert seen["known"]["overlap"] > 0.7 and seen["new"]["overlap"] == 0.0 and seen["text"]["overlap"] == 0.0
    assert found["cluster", "known"]["cluster"]["overlap"] < 0.1
    assert seen["known"]["text"] == "learned.txt/calibration"
    data = stage_table([record])["data"]
    assert "text" in set(data) and "text (in-domain)" in set(data) and "new" in set(data)
    assert any(cell.startswith("known (") and cell.endswith("% seen)") for cell in data)
    free = pipeline(*command, "method=cluscomp_data_free", "order=[cluster]")
    assert all(row.seen == {} for row in free.record.scores)
