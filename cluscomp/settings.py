"""Settings classes: what all of them have in common, and how they are described."""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Class = TypeVar("Class", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(cls: Class) -> Class:
    """Make a class one of settings: frozen, built by keywords, each value checked against its type, none added."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))(cls)  # type: ignore[return-value]


def described(value: Any) -> Any:
    """Settings as plain values for keys, cells and records, under "class" their class: two of them never look alike.

    Settings within settings, and in dictionaries and lists, are told in the same way; what else is no plain value as
    its `str`.
    """
    if is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class": name} | {field.name: described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
