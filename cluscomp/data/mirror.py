"""Data sets as `datasets` gives them: a local mirror, what it says of rows out of reach, rows without text."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cluscomp.errors import InputError

log = logging.getLogger(__name__)


def in_mirror(data_root: str, id: str) -> Path:
    """The folder or file of a data set in a mirror. Raises InputError, with the nearest names, if it is not there."""
    root = Path(data_root).expanduser()
    if not (root / id).exists():
        found = [*root.glob("*/*"), *(root.glob("*") if "/" not in id else ())]
        there = sorted(str(path.relative_to(root)) for path in found if path.is_dir())
        near = " or ".join(get_close_matches(id, there))
        raise InputError(f"data_root={data_root}: no folder {id} in it" + f"; did you mean {near}?" * bool(near))
    return root / id


def own_cache(folder: Path) -> str:
    """Where `datasets` is to keep its copy of a local folder's rows: elsewhere once a file there is another one.

    By itself it tells folders with a README apart by their last name and that README: it would give the rows that a
    file had before, or those of another folder.
    """
    from datasets.config import HF_DATASETS_CACHE

    state = json.dumps(state_of(folder))
    return str(Path(HF_DATASETS_CACHE) / f"cluscomp-{hashlib.sha256(state.encode()).hexdigest()[:16]}")


def state_of(folder: Path) -> list[list[str | int]]:
    """What changes when a file in a folder becomes another one: path, size and time of each."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@contextmanager
def copies_told() -> Iterator[None]:
    """Name the setting that helps where `datasets` cannot write its copy of the rows (InputError)."""
    try:
        yield
    except OSError as error:
        from datasets.config import HF_DATASETS_CACHE

        copies, place = Path(HF_DATASETS_CACHE), Path(error.filename or "/")
        if not (place.is_relative_to(copies) or (place.name and copies.is_relative_to(place))):
            raise
        raise InputError(
            f"{place}: {error.strerror}, and `datasets` keeps its copies of rows there; set HF_DATASETS_CACHE "
            "in the environment to a folder that can be written"
        ) from error


@contextmanager
def rows_told(what: str) -> Iterator[None]:
    """Name what cannot be read, and the way without network where that is what it takes (InputError)."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    network = (DatasetNotFoundError, HfHubHTTPError, ConnectionError, FileNotFoundError, TimeoutError)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever `datasets` and its clients make of what they do not find or reach
        if isinstance(error, OSError) and not isinstance(error, network):
            raise  # of this machine: see `copies_told`
        found_nothing = isinstance(error, DataFilesNotFoundError)
        if found_nothing or (isinstance(error, ValueError | KeyError) and not isinstance(error, network)):
            raise InputError(f"{what}: {_first_lines(error, 2)}") from error  # the second says what there is
        raise InputError(
            f"{what}: cannot be read ({_first_lines(error, 1)}). Without network give data_root=FOLDER, a mirror laid "
            "out like the hub, or data=text data.file=FILE.jsonl, or take data=pydoc"
        ) from error


def no_column(what: str, column: str, there: Iterable[str]) -> InputError:
    """The refusal of a column that rows do not have, with those they have."""
    return InputError(f"{what}: has no column '{column}'; its columns are {', '.join(there)}")


def text_of(row: Mapping[str, Any], column: str, what: str) -> str | None:
    """The text in a row's column, None where that is null.

    Raises InputError, beginning with `what`, for a column that is not there or holds no text.
    """
    if column not in row:
        raise no_column(what, column, row)
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise InputError(f"{what}: column '{column}' holds {type(value).__name__}, no text")
    return value


def with_text(rows: list[Any], what: str, column: str) -> list[str]:
    """The rows of a column but those that are null, which a line in the log counts.

    Raises InputError, beginning with `what`, that names the row and column of anything else that is no text.
    """
    texts = [text_of({column: row}, column, f"{what}, row {number}") for number, row in enumerate(rows)]
    found = [text for text in texts if text is not None]
    if len(found) < len(rows):
        log.info("%s: %d of %d rows have no text, and are left out", what, len(rows) - len(found), len(rows))
    return found


def _first_lines(error: Exception, count: int) -> str:
    return " ".join(str(error).splitlines()[:count]) or type(error).__name__
