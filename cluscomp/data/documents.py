"""Documents of any data set with a column of text, drawn from a stream: no more is read than is needed."""

import logging
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from cluscomp.data.mirror import copies_told, in_mirror, rows_told, text_of
from cluscomp.data.texts import Split, Text, fifth_apart, read_once, version, without_overlap
from cluscomp.errors import InputError
from cluscomp.settings import settings

log = logging.getLogger(__name__)
REACHED = 10.0  # seconds in which the hub answers: `datasets` by itself tries for one and a half minutes
BUFFER = 10_000  # documents of which the stream's next one is drawn
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}  # of a file alone


@settings
class Documents:
    """`documents` rows of a data set's column of text, drawn by `seed` from a stream; null: all, in their order.

    `id` is a data set of the hub, at a `revision` (null: the newest), or in the folder `data_root`, laid out like the
    hub, or a file or folder with rows. `files` are patterns of names of the data set's files, null: all. Blank rows are
    passed over. `calibration` and `test` name splits; `test` null takes the last fifth of the rows drawn. A score is
    marked where the model learned from a text of the same `domain`.
    """

    name: str
    domain: str
    id: str = Field(min_length=1)
    revision: str | None
    config: str | None
    files: list[str] | None
    calibration: str
    test: str | None
    column: str
    documents: int | None = Field(ge=2)
    seed: int = Field(ge=0, lt=2**64)
    separator: str | None
    data_root: str | None

    def __post_init__(self) -> None:
        """Raises ValueError if both texts are the same split."""
        if self.calibration == self.test:
            raise ValueError(f"data.calibration and data.test are both '{self.test}'; null takes a part of the one")

    def text(self, split: Split) -> Text:
        """One split's rows; the calibration text leaves out what also stands in the test text."""
        where = self._place()
        return read_once((self, split, version(where)), lambda: self._read(split))

    def _read(self, split: Split) -> Text:
        if self.test is not None:
            calibration, test = self._drawn("calibration", self.calibration), self._drawn("test", self.test)
        else:
            rows = self._drawn("calibration", self.calibration)
            if len(rows) < 2:
                raise InputError(f"data.id={self.id}: one row of text cannot be split into two texts; give data.test")
            calibration, test = fifth_apart(rows)
        named = f"{self.id}/{self.calibration if split == 'calibration' else self.test or f'{self.calibration} (end)'}"
        return Text(named, test if split == "test" else without_overlap(calibration, test), self.separator)

    def _drawn(self, role: Split, split: str) -> list[str]:
        what = f"data.id={self.id}, data.{role}={split}" + f", data.files={self.files}" * bool(self.files)
        key = (self, "drawn", split, version(self._place()))
        return read_once(key, lambda: Text(what, list(self._stream(split, what)), self.separator)).rows

    def _stream(self, split: str, what: str) -> Iterator[str]:
        from datasets import load_dataset
        from huggingface_hub import HfApi, is_offline_mode

        place = self._place()
        reader = READERS.get(Path(place).suffix) if Path(place).is_file() else None
        found, passed = 0, 0
        with copies_told(), rows_told(what):
            if not Path(place).exists() and not is_offline_mode():
                HfApi().dataset_info(place, revision=self.revision, timeout=REACHED)
            rows = load_dataset(
                reader or place, self.config, data_files=place if reader else self.files, split=split,
                revision=self.revision, streaming=True,
            )  # fmt: skip
            drawn = rows if self.documents is None else rows.shuffle(seed=self.seed, buffer_size=BUFFER)
            for number, row in enumerate(drawn):
                text = text_of(row, self.column, f"{what}, row {number}")
                if text is None or not text.strip():
                    passed += 1
                    continue
                yield text
                found += 1
                if found == self.documents:
                    break
        if found == 0:
            raise InputError(f"{what}: none of {passed} rows has text in column '{self.column}'")
        if passed:
            log.info("%s: %d of %d rows have no text, and are left out", what, passed, found + passed)
        if self.documents is not None and found < self.documents:
            log.warning(
                "%s: has %d rows of text, all of which are taken for data.documents=%d", what, found, self.documents
            )

    def _place(self) -> str:
        """The folder or file, or the id on the hub. Raises InputError if that is not there or has no revisions."""
        place = Path(self.id).expanduser()
        if not place.exists() and self.data_root is not None:
            place = in_mirror(self.data_root, self.id)
        elif not place.exists() and place.suffix in READERS:
            raise InputError(f"data.id={self.id}: there is no such file")
        elif not place.exists():
            return self.id
        if self.revision is not None:
            raise InputError(f"data.revision={self.revision}: of the hub alone, and {place} is not on it; leave it out")
        return str(place)
