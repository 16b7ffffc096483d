"""Text to windows of token ids, seeded and hashed. Settings classes, one for each kind of yaml in conf/data.

Every source has two texts that never overlap: "calibration" (what a method may look at) and "test" (what is scored).
"""

import hashlib
import random
import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from pydantic.dataclasses import dataclass

from cluscomp.data.mirror import copies_told, in_mirror, no_column, own_cache, rows_told, with_text
from cluscomp.errors import InputError
from cluscomp.settings import settings

Split = Literal["calibration", "test"]
WINDOWS_FROM_DOCUMENTS, DOCUMENT_SEED = 256, 0  # the literature's C4 test set: 256 random windows, seed 0
SPECIAL_TOKENS = 8  # at most so many are added to a document
SAME_ROW = 80  # characters from which an equal row in both texts counts as overlap


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, text: str, *, verbose: bool) -> Any:
        """An object with `input_ids`."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of text. With a separator they are joined into one stream; without, windows come from single rows.

    Each object equals itself alone, so that its tokens can be cached; `sha256` compares contents.
    """

    name: str
    rows: list[str]
    separator: str | None

    @cached_property
    def sha256(self) -> str:
        """Hash of the rows and how they are joined."""
        return hashlib.sha256("\0".join([repr(self.separator), *self.rows]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a record says of the text."""
        return {"text": self.name, "rows": len(self.rows), "sha256": self.sha256}


@runtime_checkable
class Source(Protocol):
    """A data set with a calibration and a test text; those of one `domain` are pieces of one data set."""

    name: str

    @property
    def domain(self) -> str:
        """What a score on one text and learning from another must not have in common."""
        ...

    def text(self, split: Split) -> Text:
        """The rows of one split. Raises InputError if they cannot be read."""
        ...


_READ: dict[str, Text] = {}


def read_once(key: Any, read: Callable[[], Text]) -> Text:
    """The text that `read` gives; a process reads it once for each key (a value whose `repr` is its content)."""
    name = repr(key)
    if name not in _READ:
        _READ[name] = read()
    return _READ[name]


def version(file: str | None) -> Any:
    """What changes when a file or folder becomes another."""
    path = Path(file or "").expanduser().absolute()
    status = path.stat() if file and path.exists() else None
    return str(path), status and (status.st_mtime_ns, status.st_size)


def without_overlap(calibration: list[str], test: list[str]) -> list[str]:
    """The calibration rows that do not also stand in the test text (rows of 80 characters and more)."""
    seen = {row for row in test if len(row) >= SAME_ROW}
    return [row for row in calibration if row not in seen]


def fifth_apart(rows: list[str]) -> tuple[list[str], list[str]]:
    """All but the last fifth of some rows, and these last ones: the test text of what has none of its own."""
    border = len(rows) * 4 // 5
    return rows[:border], rows[border:]


def split(text: Text, share: float) -> tuple[Text, Text]:
    """The text without its last rows, and these last rows: about `share` of the characters, a row at least.

    Raises InputError if the text has a single row.
    """
    if len(text.rows) < 2:
        raise InputError(f"{text.name}: one row of text cannot be split into two parts")
    border, left = len(text.rows) - 1, share * sum(map(len, text.rows)) - len(text.rows[-1])
    while border > 1 and left > 0:
        border -= 1
        left -= len(text.rows[border])
    first, last = text.rows[:border], text.rows[border:]
    return Text(text.name, without_overlap(first, last), text.separator), Text(
        f"{text.name}/held out", last, text.separator
    )


@settings
class HubText:
    """A text column of a Hugging Face data set, from the hub or from `data_root`/`id`, a mirror laid out like it.

    `calibration` and `test` name splits; `files` maps split names to files of the repository where the data set is too
    large to load whole. `separator` null draws windows from single documents (the usual C4 protocol). A score is marked
    where the model learned from a text of the same `domain`.
    """

    name: str
    domain: str
    id: str
    config: str | None
    files: dict[str, str] | None
    calibration: str
    test: str
    column: str
    separator: str | None
    data_root: str | None

    def __post_init__(self) -> None:
        """Raises ValueError if both texts are the same split."""
        if self.calibration == self.test:
            raise ValueError(f"data.calibration and data.test are both '{self.test}': they must not overlap")

    def text(self, split: Split) -> Text:
        """One split's rows; the calibration text leaves out what also stands in the test text."""
        return read_once((self, split, version(self.data_root)), lambda: self._read(split))

    def _read(self, split: Split) -> Text:
        test = self._rows(self.test)
        rows = test if split == "test" else without_overlap(self._rows(self.calibration), test)
        return Text(f"{self.id}/{getattr(self, split)}", rows, self.separator)

    @copies_told()
    def _rows(self, split: str) -> list[str]:
        from datasets import load_dataset

        place, cache = self.id, None
        if self.data_root is not None:
            folder = in_mirror(self.data_root, self.id)
            place, cache = str(folder), own_cache(folder)
        what = f"data {self.name}: {place}, split '{split}'"
        with rows_told(what):
            rows = load_dataset(place, self.config, data_files=self.files, split=split, cache_dir=cache)
            if self.column not in rows.column_names:
                raise no_column(what, self.column, rows.column_names)
            return with_text(list(rows[self.column]), what, self.column)


@settings
class PydocText:
    """The prose of the Python manual that every Python carries (`pydoc_data.topics`): real English, no download.

    Whole topics go to one side: every third, by name, is test text. Other Python versions have other text, so
    scores on it compare only where the hash in the protocol agrees.
    """

    name: str

    @property
    def domain(self) -> str:
        """The manual, of which both texts are parts."""
        return "pydoc"

    def text(self, split: Split) -> Text:
        """The prose paragraphs of the split's topics."""
        return read_once((self, split), lambda: self._read(split))

    def _read(self, split: Split) -> Text:
        from pydoc_data.topics import topics

        names = sorted(topics)
        test = prose("\n\n".join(topics[name] for name in names[::3]))
        others = prose("\n\n".join(topics[name] for number, name in enumerate(names) if number % 3))
        seen = set(test)
        rows = test if split == "test" else [row for row in others if row not in seen]
        return Text(f"{self.name}/{split}", rows, "\n\n")


def prose(text: str) -> list[str]:
    """The paragraphs of a manual that are sentences, unwrapped and without repeats; headings and code are left out."""
    unwrapped = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    unmarked = (re.sub(r"^(\*|\d+\.|\[\d+\]) ", "", part) for part in unwrapped)
    sentences = (part for part in unmarked if re.match(r"[A-Z*].{39,}[.:]$", part) and ">>>" not in part)
    words = (part for part in sentences if sum(c.isalpha() or c == " " for c in part) > 0.8 * len(part))
    return list(dict.fromkeys(words))


@lru_cache(maxsize=4)
def tokenize(text: Text, tokenizer: Tokenizer) -> Int[np.ndarray, " tokens"]:
    """Token ids of the joined rows, (tokens,) int64; special tokens as the tokenizer adds them, once at the start.

    The same array each time for one text and tokenizer: it cannot be written to.
    """
    joined = (text.separator or "").join(text.rows)
    ids = np.asarray(tokenizer(joined, verbose=False).input_ids, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def calibration_windows(
    text: Text, tokenizer: Tokenizer, *, samples: int, length: int, seed: int
) -> Int[np.ndarray, "W T"]:
    """`samples` random windows of `length` tokens: (W, T) int64. Raises InputError if the text is too short."""
    rng = random.Random(seed)
    if text.separator is None:
        return windows_from_documents(text, tokenizer, samples, length, rng)
    ids = tokenize(text, tokenizer)
    _check_length(text, len(ids), length)
    starts = [rng.randint(0, len(ids) - length) for _ in range(samples)]
    return np.stack([ids[start : start + length] for start in starts])


def test_windows(text: Text, tokenizer: Tokenizer, *, length: int, limit: int | None) -> Int[np.ndarray, "W T"]:
    """The windows a perplexity is measured on: (W, T) int64; `limit` keeps the first so many.

    Joined text: consecutive, not overlapping, full windows only. Documents: 256 random windows, seed 0, both as usual
    since GPTQ. Raises InputError if the text is too short for one window.
    """
    if text.separator is None:
        rng = random.Random(DOCUMENT_SEED)
        return windows_from_documents(text, tokenizer, WINDOWS_FROM_DOCUMENTS, length, rng)[:limit]
    ids = tokenize(text, tokenizer)
    _check_length(text, len(ids), length)
    return ids[: len(ids) // length * length].reshape(-1, length)[:limit].copy()


def windows_from_documents(
    text: Text, tokenizer: Tokenizer, count: int, length: int, rng: random.Random
) -> Int[np.ndarray, "W T"]:
    """Random windows, (W, T) int64, of random documents longer than a window. Raises InputError if there is none."""
    tokens: dict[int, list[int]] = {}

    def long_enough(number: int) -> bool:
        row = text.rows[number]
        if number not in tokens:  # a token is a byte at least
            few = len(row.encode()) + SPECIAL_TOKENS <= length
            tokens[number] = [] if few else tokenizer(row, verbose=False).input_ids
        return len(tokens[number]) > length

    by_length = sorted(range(len(text.rows)), key=lambda number: -len(text.rows[number].encode()))
    if not any(map(long_enough, by_length)):
        longest = text.rows[by_length[0]] if by_length else ""
        _check_length(text, len(tokenizer(longest, verbose=False).input_ids), length + 1)
    windows: list[list[int]] = []
    while len(windows) < count:
        number = rng.randint(0, len(text.rows) - 1)
        if long_enough(number):
            start = rng.randint(0, len(tokens[number]) - length - 1)
            windows.append(tokens[number][start : start + length])
    return np.asarray(windows, dtype=np.int64)


def _check_length(text: Text, tokens: int, length: int) -> None:
    if not any(row.strip() for row in text.rows):
        raise InputError(f"{text.name}: 0 tokens, for there is no text in it")
    if tokens < length:
        raise InputError(f"{text.name}: {tokens} tokens are too few for one window of {length}; give a shorter length")
