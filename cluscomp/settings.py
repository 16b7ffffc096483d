"""Settings classes: what all of them have in common, and how they are described."""

from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Class = TypeVar("Class", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(cls: Class) -> Class:
    """Make a class one of settings: frozen, built by keywords, each value checked against its type, none added."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))(cls)  # type: ignore[return-value]
