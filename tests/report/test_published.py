"""Published numbers: the files at hand are whole and clean, and what is wrong in a file is told by line and column."""

import re
from pathlib import Path

import pytest

from cluscomp.errors import InputError
from cluscomp.report.published import CONTEXTS, MODELS, UNPLACED, Published, read, read_folder

FOLDER = Path(__file__).resolve().parents[2] / "results" / "published"
FILES = sorted(FOLDER.glob("*.csv"))
HEAD = ",".join(Published.__dataclass_fields__)
GOOD = "A,Table 1,Llama-2-7B,GPTQ,2 g128,2.141,gptq_2048,wikitext2,perplexity,36.77,its paper,"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.csv").write_text(f"{HEAD}\n{GOOD}\n")
    return tmp_path


def test_a_row_is_read_as_it_stands(folder):
    (row,) = read_folder(folder)
    assert (row.model, row.bits_published, row.bits, row.value) == ("Llama-2-7B", "2 g128", 2.141, 36.77)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("36.77", "nought", r"line 2, column value = 'nought'"),
        ("36.77", "-1", r"line 2, column value"),
        ("36.77", "", r"line 2: value: without one"),
        ("2.141", "two", r"line 2, column bits_stored = 'two'"),
        ("gptq_2048", "gptq", r"line 2, column protocol = 'gptq'"),
        ("perplexity", "ppl", r"line 2, column metric = 'ppl'"),
        ("perplexity,36.77", '"acc, %",3677', r"line 2: value: 3677.0 percent"),
        ("its paper", "", r"line 2, column source"),
        ("its paper,", "its paper", r"line 2: not as many cells"),
        ("its paper,", "its paper,,", r"line 2: not as many cells"),
        ("Llama-2-7B", "", r"row 1: model or bits_published is empty; such rows go to unplaced\.csv"),
        ("2 g128,2.141", "?,", r"row 1: model or bits_published is empty"),
        ("paper,table", "table,paper", r"line 1: columns"),
        ("its paper,\n", f"its paper,\n{GOOD}\n", r"printed twice: A, Table 1, Llama-2-7B"),
    ],
)
def test_what_is_wrong_is_named(folder, before, after, named):
    path = folder / "a.csv"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(InputError, match=named):
        read_folder(folder)


def test_rows_that_cannot_stand_in_a_table_are_read_apart(folder):
    (folder / "a.csv").rename(folder / UNPLACED)
    assert read_folder(folder) == [] and len(read(folder / UNPLACED)) == 1


def test_the_files_at_hand_are_whole():
    rows = read_folder(FOLDER)
    assert len(rows) + len(read(FOLDER / UNPLACED)) == 1735  # those that were found; a row added is counted here, too
    assert set(MODELS.values()) <= {row.model for row in rows}
    assert all(row.source and row.paper for path in FILES for row in read(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_bits_of_uniform_grids_follow_from_groups(path):
    for row in read(path):
        if (printed := re.fullmatch(r"(\d) g(\d+)", row.bits_published)) and row.bits_stored is not None:
            width, group = map(int, printed.groups())
            assert row.bits_stored == pytest.approx(width + (16 + width) / group, abs=6e-4)


def test_protocols_are_those_of_the_settings():
    """Each perplexity protocol is a yaml of conf/evaluate with that context."""
    for name, context in CONTEXTS.items():
        assert f"context: {context}" in (FOLDER.parents[1] / "conf" / "evaluate" / f"{name}.yaml").read_text()


def test_the_only_numbers_of_the_paper_are_those_that_could_be_recovered():
    found = {(row.model, row.method, row.bits_published): row.value for row in read(FOLDER / "cluscomp.csv")}
    assert found["Llama-3-8B", "ClusComp", "2.01"] == 53.6
    assert found["Llama-3-70B", "ClusComp+", "1"] == 51.4
