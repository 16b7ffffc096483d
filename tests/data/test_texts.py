"""Texts and windows: splits that never overlap, hashes, slices by hand, and a slow rewrite of GPTQ's C4 protocol."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from cluscomp.data.files import FileText
from cluscomp.data.texts import (
    HubText,
    PydocText,
    Text,
    calibration_windows,
    copies_told,
    prose,
    tokenize,
    without_overlap,
)
from cluscomp.data.texts import test_windows as windows_for_test  # its name would make pytest collect it
from cluscomp.errors import InputError

LONG = "The same long paragraph stands in both of the files and has well over eighty characters in it."


def letters(text: str, *, verbose: bool) -> SimpleNamespace:
    """A toy tokenizer: a token is a character, its id the character's code."""
    return SimpleNamespace(input_ids=[ord(character) for character in text])


def words(text: str, *, verbose: bool) -> SimpleNamespace:
    """A toy tokenizer with a start token: 0, then the length of each word."""
    return SimpleNamespace(input_ids=[0, *(len(word) for word in text.split())])


def hub(**changes) -> HubText:
    values = {
        "name": "mirror", "domain": "mirror", "id": "org/name", "config": None, "files": None, "calibration": "train",
        "test": "test", "column": "text", "separator": "\n\n", "data_root": None,
    }  # fmt: skip
    return HubText(**values | changes)


def mirror(root, **splits):
    """A data set folder laid out like the hub: one JSON-lines file a split."""
    import json

    folder = root / "org" / "name"
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    header = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{header}---\n")
    return str(root)


def test_pydoc_splits_share_no_paragraph_and_are_the_same_every_time():
    source = PydocText(name="pydoc")
    calibration, test = source.text("calibration"), source.text("test")
    assert len(calibration.rows) > 500 and len(test.rows) > 100
    assert not set(calibration.rows) & set(test.rows)
    assert source.text("calibration").sha256 == calibration.sha256
    assert calibration.sha256 != test.sha256
    assert calibration.describe() == {
        "text": "pydoc/calibration", "rows": len(calibration.rows), "sha256": calibration.sha256
    }  # fmt: skip


def test_prose_keeps_sentences_and_drops_headings_code_and_repeats():
    sentence = "A long enough sentence that was wrapped\nover two lines of the manual."
    text = (
        f"Heading\n*******\n\n{sentence}\n\n   x = [1, 2, 3] + f(a, b)[0] ** 2 // 3 - g(c)\n\n{sentence}\n\nToo short."
    )
    assert prose(text) == ["A long enough sentence that was wrapped over two lines of the manual."]


@pytest.mark.parametrize(
    "other",
    [
        Text("t", ["one", "twp"], "\n"),
        Text("t", ["one", "two"], None),
        Text("t", ["one", "two"], "\n\n"),
        Text("t", ["two", "one"], "\n"),
        Text("t", ["onet", "wo"], "\n"),
    ],
)
def test_hash_changes_with_a_character_the_separator_order_and_borders(other):
    text = Text("t", ["one", "two"], "\n")
    assert Text("another name", ["one", "two"], "\n").sha256 == text.sha256
    assert other.sha256 != text.sha256


def test_overlap_goes_out_of_the_calibration_text_only_if_long():
    assert without_overlap([LONG, "a", "b"], [LONG, "a"]) == ["a", "b"]


def test_joined_text_is_tokenized_once():
    ids = tokenize(Text("t", ["ab c", "d"], " "), words)
    assert ids.dtype == np.int64 and ids.tolist() == [0, 2, 1, 1]


def test_calibration_windows_are_seeded_slices_of_the_text():
    text = Text("t", ["".join(map(chr, range(100, 200)))], "\n")
    windows = calibration_windows(text, letters, samples=20, length=7, seed=3)
    assert windows.shape == (20, 7) and windows.dtype == np.int64
    assert np.array_equal(windows - windows[:, :1], np.tile(np.arange(7), (20, 1)))  # 7 neighbours each
    assert windows.min() >= 100 and windows.max() < 200
    assert np.array_equal(windows, calibration_windows(text, letters, samples=20, length=7, seed=3))
    assert not np.array_equal(windows, calibration_windows(text, letters, samples=20, length=7, seed=4))


def test_a_window_may_be_the_whole_text():
    text = Text("t", ["abc"], "\n")
    assert calibration_windows(text, letters, samples=2, length=3, seed=0).tolist() == [[97, 98, 99]] * 2


def test_test_windows_are_consecutive_full_and_limited():
    text = Text("t", ["abc", "def", "gh"], "_")  # abc_def_gh, 10 tokens
    by_hand = [[ord(c) for c in window] for window in ("abc", "_de", "f_g")]  # "h" is no full window
    assert windows_for_test(text, letters, length=3, limit=None).tolist() == by_hand
    assert windows_for_test(text, letters, length=3, limit=2).tolist() == by_hand[:2]
    assert windows_for_test(text, letters, length=3, limit=9).tolist() == by_hand
    assert windows_for_test(text, letters, length=10, limit=None).shape == (1, 10)


def gptq_c4(rows, length, count, seed):
    """GPTQ's datautils.get_c4, word for word but for the tokenizer: redraw a document until it is long enough."""
    random.seed(seed)
    windows = []
    for _ in range(count):
        while True:
            i = random.randint(0, len(rows) - 1)
            ids = letters(rows[i], verbose=False).input_ids
            if len(ids) > length:
                break
        i = random.randint(0, len(ids) - length - 1)
        j = i + length
        windows.append(ids[i:j])
    return windows


def test_documents_follow_the_c4_protocol_of_gptq():
    make = random.Random(1)
    rows = ["".join(make.choices("abcdefgh ", k=make.randint(1, 40))) for _ in range(30)]
    rows += ["x" * 12, "y" * 13]  # exactly as long as a window, and one longer
    text = Text("c4", rows, None)
    windows = windows_for_test(text, letters, length=12, limit=None)
    assert windows.tolist() == gptq_c4(rows, 12, 256, seed=0)
    assert windows_for_test(text, letters, length=12, limit=5).tolist() == windows[:5].tolist()
    assert calibration_windows(text, letters, samples=9, length=12, seed=7).tolist() == gptq_c4(rows, 12, 9, seed=7)


@pytest.mark.parametrize("separator", ["\n", None])
def test_too_short_a_text_says_how_many_tokens_there_are(separator):
    text = Text("book.txt/test", ["abcdefg"], separator)
    with pytest.raises(InputError, match=r"book.txt/test: 7 tokens .* window of \d+"):
        windows_for_test(text, letters, length=8, limit=None)
    with pytest.raises(InputError, match="7 tokens"):
        calibration_windows(text, letters, samples=1, length=8, seed=0)


def test_a_document_just_as_long_as_a_window_is_too_short():
    with pytest.raises(InputError, match="8 tokens are too few"):
        windows_for_test(Text("t", ["abcdefgh"], None), letters, length=8, limit=None)


def test_documents_are_measured_in_tokens_not_characters():
    """A character can be several tokens (bytes), and a start token adds one: no such document may be passed over."""

    def utf8(text: str, *, verbose: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[300, *text.encode()])

    rows = ["é" * 5, "a" * 8, "b" * 7]  # 11, 9 and 8 tokens: two of three are longer than a window of 8
    windows = windows_for_test(Text("t", rows, None), utf8, length=8, limit=None)
    assert {chr(window[-1]) for window in windows.tolist()} > {"a"}


def test_no_rows_at_all_is_an_input_error():
    for separator in ("\n", None):
        with pytest.raises(InputError, match="0 tokens"):
            windows_for_test(Text("t", [], separator), letters, length=8, limit=None)


def test_a_text_is_read_once_until_its_file_changes(tmp_path, monkeypatch):
    def source(file: str = "book.txt") -> FileText:
        return FileText(name="text", file=file, test_file=None)

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text(f"{folder}\n\ntwo\n\nthree")
    monkeypatch.chdir(tmp_path / "one")
    first = source().text("calibration")
    assert source().text("calibration") is first and source().text("test").rows == ["three"]
    monkeypatch.chdir(tmp_path / "two")
    assert source().text("calibration").rows == ["two", "two"]
    (tmp_path / "two" / "book.txt").write_text("another\n\ntext\n\nhere")
    assert source().text("calibration").rows == ["another", "text"]
    pydoc = PydocText(name="pydoc").text("test")
    assert PydocText(name="pydoc").text("test") is pydoc
    assert PydocText(name="pydoc").text("calibration") is not pydoc


def test_a_text_is_tokenized_once_and_its_tokens_cannot_be_changed():
    calls = []

    def counting(text: str, *, verbose: bool) -> SimpleNamespace:
        calls.append(text)
        return letters(text, verbose=verbose)

    text, same = Text("t", ["abc", "def"], "_"), Text("t", ["abc", "def"], "_")
    windows = windows_for_test(text, counting, length=3, limit=None)
    windows[:] = 0
    assert calibration_windows(text, counting, samples=9, length=3, seed=0).min() > 0
    assert len(calls) == 1
    with pytest.raises(ValueError, match="read-only"):
        tokenize(text, counting)[0] = 0
    windows_for_test(same, counting, length=3, limit=None)
    assert len(calls) == 2


def test_documents_that_are_not_drawn_are_not_tokenized():
    """But for the longest, which tells that there is one long enough."""
    calls = []

    def counting(text: str, *, verbose: bool) -> SimpleNamespace:
        calls.append(text)
        return letters(text, verbose=verbose)

    rows = ["x" * (20 + number) for number in range(50)]
    drawn = calibration_windows(Text("c4", rows, None), counting, samples=3, length=12, seed=7)
    assert drawn.tolist() == gptq_c4(rows, 12, 3, seed=7)
    assert len(calls) <= 4 and len(set(calls)) == len(calls)


def test_a_mirror_is_known_by_its_files_not_by_its_name(tmp_path):
    """`datasets` would give the rows of the first one that it met under this name, with this README."""
    first, second = (hub(data_root=mirror(tmp_path / n, train=[f"{n} one"], test=[f"{n} two"])) for n in "ab")
    assert [one.text("test").rows for one in (first, second)] == [["a two"], ["b two"]]
    (tmp_path / "a" / "org" / "name" / "test.jsonl").write_text('{"text": "another"}\n')
    assert hub(data_root=f"{tmp_path}/./a").text("test").rows == ["another"]


def test_rows_of_null_are_left_out_and_others_that_are_no_text_named(tmp_path, caplog):
    caplog.set_level("INFO")
    root = mirror(tmp_path / "hub", train=["one", None, "", "two"], test=["three", None])
    source = hub(data_root=root)
    assert source.text("calibration").rows == ["one", "", "two"] and source.text("test").rows == ["three"]
    assert "org/name, split 'train': 1 of 4 rows have no text" in caplog.text
    root = mirror(tmp_path / "other", train=[["a"], ["b"]], test=[["c"]])
    with pytest.raises(InputError, match=r"org/name, split 'test', row 0: column 'text' holds list, no text"):
        hub(data_root=root).text("test")


def test_one_split_for_both_texts_is_refused():
    with pytest.raises(ValueError, match=r"data\.calibration and data\.test are both 'test'"):
        hub(calibration="test")


def test_a_data_root_without_the_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data_root=.*org/name"):
        hub(data_root=str(tmp_path)).text("test")


def test_a_data_set_out_of_reach_says_what_works_without_network():
    with pytest.raises(InputError, match="data_root=FOLDER"):
        hub().text("test")


def test_a_local_mirror_is_read_and_overlap_removed(tmp_path):
    root = mirror(tmp_path / "hub", train=["one", LONG, "two"], test=[LONG, "one"])
    source = hub(data_root=root)
    assert source.text("test").rows == [LONG, "one"]
    assert source.text("calibration").rows == ["one", "two"]
    assert source.text("test").name == "org/name/test"


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("")  # no folder can be made in it, whoever runs the test
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    with pytest.raises(InputError, match="HF_DATASETS_CACHE"):
        hub(data_root=mirror(tmp_path, train=["one"], test=["two"])).text("test")
    with pytest.raises(InputError, match=r"Permission denied.*HF_DATASETS_CACHE"), copies_told():
        raise PermissionError(13, "Permission denied", str(tmp_path / "home"))
    with pytest.raises(PermissionError), copies_told():  # of the rows themselves
        raise PermissionError(13, "Permission denied", str(tmp_path / "org" / "rows"))


@pytest.mark.parametrize(
    ("changes", "named"), [({"calibration": "dev"}, "dev"), ({"column": "txt"}, "txt"), ({"config": "xx"}, "xx")]
)
def test_a_wrong_split_column_or_config_is_named(tmp_path, changes, named):
    root = mirror(tmp_path / "hub", train=["one"], test=["two"])
    with pytest.raises(InputError, match=named):
        hub(data_root=root, **changes).text("calibration")


def test_wikitext2_from_the_shared_mirror(shared):
    source = hub(
        name="wikitext2", id="Salesforce/wikitext", config="wikitext-2-raw-v1", calibration="train_head",
        data_root=str(shared / "data" / "hub"),
    )  # fmt: skip
    test = source.text("test")
    assert len(test.rows) == 4358  # as on the hub
    assert test.rows[1] == " = Robert Boulter = \n"
    calibration = source.text("calibration")
    long_rows = {row for row in test.rows if len(row) >= 80}
    assert 3000 < len(calibration.rows) <= 3280 and not long_rows & set(calibration.rows)


def test_c4_from_the_shared_mirror(shared):
    source = hub(
        name="c4", id="allenai/c4-sample", config="en", test="validation", separator=None,
        data_root=str(shared / "data" / "hub"),
    )  # fmt: skip
    assert len(source.text("test").rows) == 594
    windows = windows_for_test(source.text("test"), letters, length=256, limit=3)
    assert windows.shape == (3, 256)
