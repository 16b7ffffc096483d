"""Text files of one's own: paragraphs, lines, and rows of JSON."""

import json

import pytest
from test_texts import LONG

from cluscomp.data.files import FileText
from cluscomp.data.instructions import Rows
from cluscomp.errors import InputError


def test_rows_of_json_are_documents(tmp_path):
    """One a line or in a list; null and blank ones are left out."""
    rows = [{"text": text, "id": number} for number, text in enumerate(["one\n\ntwo", None, "three", " ", "four"])]
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed.write_text(json.dumps(rows, indent=1))
    for path in (lines, listed):
        source = FileText(name="text", file=str(path), test_file=None)
        assert source.text("calibration").rows == ["one\n\ntwo", "three"] and source.text("test").rows == ["four"]


def test_a_row_of_json_ends_where_its_line_does(tmp_path):
    """Texts hold separators that Python takes for ends of lines, and some editors begin a file with a mark."""
    texts = ["one\u2028still one", "two\x85still two", "three"]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "prompt": text, "completion": "."}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    assert FileText(name="text", file=str(path), test_file=str(path)).text("test").rows == texts
    rows = Rows(
        name="rows", format="prompt_completion", file=str(path), id=None, config=None, split="train", data_root=None
    )
    assert [row["prompt"] for row in rows._rows()] == texts


def test_a_file_gives_its_last_fifth_to_the_test(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("one\n\ntwo\nstill two\n \n\nthree\n\n\n\nfour\n\nfive\n")
    source = FileText(name="text", file=str(file), test_file=None)
    assert source.text("calibration").rows == ["one", "two\nstill two", "three", "four"]
    assert source.text("test").rows == ["five"]
    assert source.text("test").describe()["text"] == "book.txt/test"


def test_a_text_without_blank_lines_is_cut_between_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"Line {number}." for number in range(10)))
    source = FileText(name="lines", file=str(path), test_file=None)
    assert source.text("calibration").rows == [f"Line {number}." for number in range(8)]
    assert source.text("test").rows == ["Line 8.", "Line 9."]
    assert FileText(name="lines", file=str(path), test_file=str(path)).text("test").rows == [path.read_text()]


@pytest.mark.parametrize(
    "content, words",
    [
        ("one line", "1 lines of text cannot be split"),
        ("", "0 lines of text cannot be split"),
        ('{"text": "one"}\n', "1 lines of text cannot be split"),
        (
            '{"body": "one", "id": 3}\n',
            "row 0: has no column 'text'; its columns are body, id; another",
        ),
        ('{"text": 3}\n', "row 0: column 'text' holds int, no text"),
        ('{"text": "one"}\n{"text": "two"\n', "begins with a row of JSON, but"),
        ('{"text": "one"}\n7\n', "begins with a row of JSON, but"),
    ],
)
def test_what_is_no_text_to_split_is_told(tmp_path, content, words):
    path = tmp_path / "some.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=f"data.file={path}(: |, ){words}") as caught:
        FileText(name="some", file=str(path), test_file=None).text("calibration")
    assert "shorter length" not in str(caught.value)


def test_a_test_file_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text(f"one\n\n{LONG}\n\ntwo")
    (tmp_path / "b.txt").write_text(f"{LONG}\n\none")
    source = FileText(name="text", file=str(tmp_path / "a.txt"), test_file=str(tmp_path / "b.txt"))
    assert source.text("test").rows == [LONG, "one"]
    assert source.text("calibration").rows == ["one", "two"]
    assert source.text("test").name.startswith("b.txt")  # it is b's text, so it carries b's name


def test_a_missing_test_file_is_named_by_its_own_key(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = FileText(name="text", file=str(tmp_path / "a.txt"), test_file=str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match=r"data\.test_file=.*none\.txt"):
        source.text("test")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("book.txt", None, "No such file or directory$"),
        ("book.txt", b"caf\xe9 au lait", "no text in UTF-8: .* position 3"),
        ("rows.csv", b"text\na\nb\n", r"a table; .*data=hub data\.id=.*rows\.csv data\.column=NAME"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_key_and_why(tmp_path, name, content, why):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=rf"data\.file=.*{name}: {why}"):
        FileText(name="text", file=str(file), test_file=None).text("test")
