"""The project's exceptions.

Exception
└── InputError    what the user gave cannot work; shown as one sentence, exit code 2

Everything else is a failure of ours or of the machine: exit code 1.
"""


class InputError(Exception):
    """Something the user gave (a setting, a file, a model) cannot work; the message says what and what would."""
