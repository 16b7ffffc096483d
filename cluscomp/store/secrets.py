"""Keys, tokens, passwords and what settings take from the environment stay out of everything that is written.

And what is written or shown of names that others chose is harmless to a terminal (`printable`).
"""

import functools
import json
import logging
import os
import re
import unicodedata
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
# names of settings and of environment variables whose values are secret; "tokens" of a text are not
NAMES = re.compile(
    r"(api_?key|access_?key|secret|passwd|password|credentials?|(^|[._-])(token|key|auth))$", re.IGNORECASE
)
# tokens of Hugging Face, GitHub and others, and NAME:PASSWORD in an address (of which a path keeps one slash)
SHAPES = re.compile(
    r"\bhf_\w{16,}|\bgh[a-z]_\w{16,}|\bgithub_pat_\w{16,}|\bsk-[\w-]{16,}"
    r"|(?:(?<=://)|(?<=:/))[^/\s:@]+:[^/\s@]+(?=@)"
)
LOG_BYTES = 10 * 2**20  # of a log file; one older file is kept beside it
SHORTEST = 8  # a shorter value of an environment variable may stand in any text
WORD = 4  # of values that settings hold; those from here to SHORTEST are hidden as whole words of log lines alone
# identifiers and hashes of ours, which stay as they are whatever the environment holds
OURS = {"after", "metric", "dataset", "protocol", "key", "sha256", "checkpoint_hash", "commit"}


class _Read:
    """What the settings at work took from the environment: each value with the interpolation that stands for it."""

    instead: dict[str, str] = {}
    texts = lines = re.compile(r"(?!)")


def never_write(values: dict[str, str]) -> None:
    """From now on write these interpolations in the place of these values, which came from the environment.

    The values of earlier settings are forgotten.
    """
    found = {value: said for value, said in values.items() if len(value) >= WORD}
    for value, said in [*found.items()]:
        found |= dict.fromkeys((repr(value)[1:-1], json.dumps(value)[1:-1]), said)
    ordered = sorted(found, key=len, reverse=True)
    long = [re.escape(value) for value in ordered if len(value) >= SHORTEST]
    words = [rf"(?<!\w){re.escape(value)}(?!\w)" for value in ordered if len(value) < SHORTEST]
    _Read.instead = found
    _Read.texts = re.compile("|".join(long) or r"(?!)")
    _Read.lines = re.compile("|".join([*long, *words]) or r"(?!)")


def unread(values: Any) -> Any:
    """Plain values (dictionaries, lists, texts, numbers) without what settings took from the environment."""
    if isinstance(values, dict):
        return {unread(key): part if key in OURS else unread(part) for key, part in values.items()}
    if isinstance(values, list):
        return [unread(part) for part in values]
    return _Read.texts.sub(lambda found: _Read.instead[found[0]], values) if isinstance(values, str) else values


def printable(text: str) -> str:
    """The text with what moves, colours or reorders a terminal's text as `\\x1b` and the like; lines stay lines."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} else repr(one)[1:-1]
        for one in text
    )


def hide(text: str) -> str:
    """The text without what came from the environment, values of secret variables, and what looks like a token."""
    text = _Read.lines.sub(lambda found: _Read.instead[found[0]], text)
    secret = {os.environ[name] for name in filter(_is_secret, os.environ)}
    for value in sorted(secret, key=len, reverse=True):  # of one that begins another no end is left
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


@functools.cache  # a run asks of the same variables for each of some hundred texts
def _is_secret(name: str) -> bool:
    return NAMES.search(name) is not None


def hide_override(item: str) -> str:
    """A KEY=VALUE without its value where the key's name says that it is secret."""
    name, equals, _ = item.partition("=")
    return f"{name}={HIDDEN}" if equals and NAMES.search(name) else hide(item)


def hide_all(values: Any) -> Any:
    """Plain values (dictionaries, lists, texts, numbers) without what is secret in them."""
    if isinstance(values, dict):
        return {
            hide_all(key): HIDDEN if isinstance(value, str) and NAMES.search(str(key)) else hide_all(value)
            for key, value in values.items()
        }
    if isinstance(values, list):
        return [hide_all(value) for value in values]
    return hide(values) if isinstance(values, str) else values


class Discreet(logging.Formatter):
    """A formatter of log lines, and of the exceptions they tell of, without what is secret."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, with what is secret hidden."""
        return printable(hide(super().format(record)))


def log_file(path: Path) -> logging.Handler:
    """A handler that appends log lines with their time to a file, without what is secret. Raises OSError."""
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(Discreet("%(asctime)s %(message)s"))
    return handler
