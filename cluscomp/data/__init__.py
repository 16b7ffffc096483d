"""Texts and examples, as token ids; and what of them was seen before."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """A text and the windows of it, by the room's own name; loaded when they are first named."""
    if name in ("PydocText", "test_windows"):
        return getattr(importlib.import_module("cluscomp.data.texts"), name)
    raise AttributeError(f"module {__name__} has no {name}")
