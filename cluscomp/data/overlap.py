"""How much of a test text a model has seen before: sequences of words that stand in what it learned from, too."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluscomp.data.mixture import AND
from cluscomp.data.texts import Tokenizer

DOMAINS = {  # of data sets that have a yaml and may be named by `data=hub`, a folder or a file, too
    "Salesforce/wikitext": "wikitext", "allenai/c4": "c4", "allenai/c4-sample": "c4",
    "ptb-text-only/ptb_text_only": "ptb",
}  # fmt: skip
WORDS = 13  # of a sequence, as usual since GPT-3 (arXiv 2005.14165, appendix C)


@dataclass(frozen=True, eq=False)
class Learned:
    """What a stage learns from: the text's name, domain and hash, and, cut when asked for, what of it the stage takes.

    Texts of one domain come from one data set (or pieces of it). `windows`: (tokenizer, the run's seed) -> the windows
    or examples as token ids.
    """

    name: str
    domain: str
    sha256: str
    windows: Callable[[Tokenizer, int], list[list[int]]]


def same_domain(first: str, second: str) -> bool:
    """Whether two texts have a domain in common: mixtures have those of all their parts."""
    return not {*map(_domain, first.split(AND))}.isdisjoint(map(_domain, second.split(AND)))


def _domain(name: str) -> str:
    """A domain as the yaml of that data set has it, where its name is the data set's id or a path in a mirror.

    A file's is its place, however it is told.
    """
    place = Path(name).expanduser()
    name = str(place.resolve()) if place.is_file() else name
    return next((domain for id, domain in DOMAINS.items() if f"/{id}/" in f"/{name}/"), name)


def sequences(text: str) -> set[int]:
    """Hashes of all runs of 13 words of a text; only letters and digits count, in lower case.

    They differ between processes. A script that puts no spaces between words has hardly any.
    """
    words = re.findall(r"\w+", text.lower())
    return {hash(run) for run in zip(*(words[start:] for start in range(WORDS)))}


def overlap(test: Iterable[str], seen: Iterable[str]) -> float:
    """The share of the test parts' sequences, each counted once, that stand in what was seen; 0 if there are none."""
    wanted: set[int] = set().union(*map(sequences, test))
    found: set[int] = set()
    for part in seen:
        found |= wanted & sequences(part)
    return len(found) / len(wanted) if wanted else 0.0
