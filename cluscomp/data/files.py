"""Text files of one's own: paragraphs of plain text, or rows of JSON with a text each."""

import json
import re
from pathlib import Path
from typing import Any

from cluscomp.data.mirror import text_of
from cluscomp.data.texts import Split, Text, fifth_apart, read_once, version, without_overlap
from cluscomp.errors import InputError
from cluscomp.settings import settings

COLUMN = "text"  # of rows of JSON
TABLES = (".csv", ".parquet")
ENCODING = "utf-8-sig"  # UTF-8, with the mark at the beginning that some editors write or without


@settings
class FileText:
    """Paragraphs of text files in UTF-8. Without `test_file` the last fifth of `file` is the test text.

    Of a file without blank lines that fifth is cut between lines. Of rows of JSON (a list, or an object a line) each is
    a document, in the column "text".
    """

    name: str
    file: str
    test_file: str | None

    @property
    def domain(self) -> str:
        """The file: without a `test_file` both texts come from it."""
        return str(Path(self.file).expanduser().absolute())

    def text(self, split: Split) -> Text:
        """One split's paragraphs; the calibration text leaves out what also stands in the test text."""
        versions = [version(self.file), version(self.test_file)]
        return read_once((self, split, versions), lambda: self._read(split))

    def _read(self, split: Split) -> Text:
        calibration = self._paragraphs("file", self.file)
        if self.test_file is None:
            if len(calibration) == 1:
                calibration = [line.strip() for line in calibration[0].splitlines()]
            if len(calibration) < 2:
                raise InputError(
                    f"data.file={self.file}: {len(calibration)} lines of text cannot be split into calibration and "
                    "test text; give data.test_file"
                )
            calibration, test = fifth_apart(calibration)
        else:
            test = self._paragraphs("test_file", self.test_file)
        if split == "test":
            return Text(f"{Path(self.test_file or self.file).name}/test", test, "\n\n")
        return Text(f"{Path(self.file).name}/calibration", without_overlap(calibration, test), "\n\n")

    def _paragraphs(self, key: str, file: str) -> list[str]:
        if file.endswith(TABLES):
            raise InputError(
                f"data.{key}={file}: a table; one of its columns: data=hub data.id={file} data.column=NAME"
            )
        try:
            content = Path(file).expanduser().read_text(encoding=ENCODING)
        except OSError as error:
            raise InputError(f"data.{key}={file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"data.{key}={file}: no text in UTF-8: {error}") from error
        if _is_json(content):
            return _documents(content, f"data.{key}={file}")
        return [part.strip() for part in re.split(r"\n\s*\n", content) if part.strip()]


def _documents(content: str, what: str) -> list[str]:
    """The texts of rows of JSON but those that are null or blank. Raises InputError that names what is no such row."""
    try:
        rows = json_rows(content)
        texts = [text_of(dict(row), COLUMN, f"{what}, row {number}") for number, row in enumerate(rows)]
    except (ValueError, TypeError) as error:
        raise InputError(f"{what}: begins with a row of JSON, but {error}") from error
    except InputError as error:
        raise InputError(f"{error}; another column: data=hub data.id=FILE data.column=NAME") from error
    return [text for text in texts if text and text.strip()]


def json_rows(content: str) -> list[Any]:
    """The values of a JSON list, or of JSON lines. Raises ValueError for what is neither.

    Only a line feed ends a line: texts may hold other separators (U+2028), which JSON allows in a string.
    """
    if content.lstrip().startswith("["):
        return list(json.loads(content))
    return [json.loads(line) for line in content.split("\n") if line.strip()]


def _is_json(content: str) -> bool:
    """Whether a file holds rows of JSON: an object in its first line, or a list of them."""
    first = content.lstrip()
    try:
        value = json.loads(content if first.startswith("[") else first.partition("\n")[0])
    except ValueError:
        return False
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))
