"""Settings as plain values: two classes never look alike, whatever they hold."""

from pathlib import Path
from typing import Any

from cluscomp.settings import described, settings


@settings
class Inner:
    """Settings within settings."""

    size: int


@settings
class Outer:
    """Settings with parts of all kinds."""

    parts: Any


@settings
class Other(Inner):
    """The same settings of another class."""


def test_settings_are_told_with_their_class_at_every_depth():
    inner = {"class": f"{__name__}.Inner", "size": 3}
    found = described(Outer(parts={"one": [Inner(size=3), None, 2.5, True], 7: Path("a/b")}))
    assert found == {"class": f"{__name__}.Outer", "parts": {"one": [inner, None, 2.5, True], "7": "a/b"}}
    assert described(Other(size=3)) == inner | {"class": f"{__name__}.Other"}
    assert described(Inner) == str(Inner)  # a class is no settings
