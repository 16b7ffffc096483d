"""Data sets as `datasets` gives them: a local mirror, and rows of which some have no text."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluscomp.errors import InputError

log = logging.getLogger(__name__)


def own_cache(folder: Path) -> str:
    """Where `datasets` is to keep its copy of a local folder's rows: elsewhere once a file there is another one.

    By itself it tells folders with a README apart by their last name and that README: it would give the rows that a
    file had before, or those of another folder.
    """
    from datasets.config import HF_DATASETS_CACHE

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return str(Path(HF_DATASETS_CACHE) / f"cluscomp-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}")


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


def with_text(rows: list[Any], what: str, column: str) -> list[str]:
    """The rows of a column but those that are null, which a line in the log counts.

    Raises InputError, beginning with `what`, that names the row and column of anything else that is no text.
    """
    found = [row for row in rows if isinstance(row, str)]
    for number, row in enumerate(rows):
        if row is not None and not isinstance(row, str):
            raise InputError(
                f"{what}, row {number}: column '{column}' holds {type(row).__name__}, no text; give another data.column"
            )
    if len(found) < len(rows):
        log.info("%s: %d of %d rows have no text, and are left out", what, len(rows) - len(found), len(rows))
    return found
