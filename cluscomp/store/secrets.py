"""Keys, tokens and passwords stay out of everything that is written: logs, records, cells, capsules."""

import logging
import os
import re
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


def hide(text: str) -> str:
    """The text without the values of secret environment variables and without what looks like a token."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


def hide_override(item: str) -> str:
    """A KEY=VALUE without its value where the key's name says that it is secret."""
    name, equals, _ = item.partition("=")
    return f"{name}={HIDDEN}" if equals and NAMES.search(name) else hide(item)


def hide_all(values: Any) -> Any:
    """Plain values (dictionaries, lists, texts, numbers) without what is secret in them."""
    if isinstance(values, dict):
        return {
            key: HIDDEN if isinstance(value, str) and NAMES.search(str(key)) else hide_all(value)
            for key, value in values.items()
        }
    if isinstance(values, list):
        return [hide_all(value) for value in values]
    return hide(values) if isinstance(values, str) else values


class Discreet(logging.Formatter):
    """A formatter of log lines, and of the exceptions they tell of, without what is secret."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, with what is secret hidden."""
        return hide(super().format(record))


def log_file(path: Path) -> logging.Handler:
    """A handler that appends log lines with their time to a file, without what is secret. Raises OSError."""
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(Discreet("%(asctime)s %(message)s"))
    return handler
