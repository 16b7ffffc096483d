"""The project's exceptions.

Exception
└── InputError    what the user gave cannot work; shown as one sentence, exit code 2

Everything else is a failure of ours or of the machine: exit code 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class InputError(Exception):
    """Something the user gave (a setting, a file, a model) cannot work; the message says what and what would."""


@contextmanager
def named(names: Sequence[str]) -> Iterator[None]:
    """Begin the text of a ValueError with the names of layers, if there are any."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}" if names else str(error)) from error
