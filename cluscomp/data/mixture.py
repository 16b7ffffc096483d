"""Several texts as one, in given shares."""

import math
from collections.abc import Iterator

from pydantic import InstanceOf

from cluscomp.data.texts import Source, Split, Text, read_once
from cluscomp.errors import InputError
from cluscomp.settings import settings

RUNS = 10  # of each part, which take turns: what is held out at the end (a tenth) has the same shares
AND = " + "  # between the domains of the parts


@settings
class Mixture:
    """`parts`, texts by name, each of which has its share of the characters: as many as the scarcest allows.

    `shares` are in the order of the parts. The rows of a part stay in their order and come in ten runs, one of each
    part in turn. Rows are joined by `separator`; null draws windows from single rows.
    """

    name: str
    parts: dict[str, InstanceOf[Source]]
    shares: list[float]
    separator: str | None

    def __post_init__(self) -> None:
        """Raises ValueError unless there are two parts at least, each with a share, and these add up to 1."""
        if len(self.parts) < 2:
            raise ValueError("parts: two texts at least make a mixture: +data@data.parts.NAME=CHOICE adds one")
        if len(self.shares) != len(self.parts):
            raise ValueError(f"shares: {self.shares} are not one for each of the parts {', '.join(self.parts)}")
        if min(self.shares) <= 0 or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise ValueError(f"shares: {self.shares} add up to {sum(self.shares):g}; each above 0, and 1 in all")

    @property
    def domain(self) -> str:
        """Those of all parts."""
        return AND.join(source.domain for source in self.parts.values())

    def text(self, split: Split) -> Text:
        """The rows of one split of all parts. Raises InputError if one of them cannot be read or has no text."""
        texts = [source.text(split) for source in self.parts.values()]
        key = [self.shares, self.separator, [text.sha256 for text in texts]]
        return read_once(key, lambda: self._mixed(texts))

    def _mixed(self, texts: list[Text]) -> Text:
        sizes = [sum(map(len, text.rows)) for text in texts]
        for text, size in zip(texts, sizes):
            if size == 0:
                raise InputError(f"{text.name}: there is no text in it, so it can have no share of {self.name}")
        whole = min(size / share for size, share in zip(sizes, self.shares))
        runs = [list(_runs(text.rows, whole * share)) for text, share in zip(texts, self.shares)]
        rows = [row for turn in zip(*runs) for run in turn for row in run]
        named = AND.join(f"{share:g} {text.name}" for text, share in zip(texts, self.shares))
        return Text(named, rows, self.separator)


def _runs(rows: list[str], characters: float) -> Iterator[list[str]]:
    """The first rows with so many characters, to within a row, in `RUNS` runs of about as many."""
    left, taken = iter(rows), 0
    for number in range(1, RUNS + 1):
        run = []
        while taken < characters * number / RUNS and (row := next(left, None)) is not None:
            run.append(row)
            taken += len(row)
        yield run
