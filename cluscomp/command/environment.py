"""Values that settings take from the environment: used, but never written; the interpolation stands for them."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.resolvers import oc

from cluscomp.errors import InputError
from cluscomp.store.secrets import never_write

Place = tuple[str, ...]
# settings that name folders, tables, W&B's own files, or stand in the model's: they are written as they are
WRITTEN = {"name", "names", "mean", "order", "after", "project", "entity", "architecture", "_target_"}
ABSENT = object()


def resolved(config: DictConfig) -> tuple[dict[str, Any], dict[Place, str]]:
    """All values of a config, and for each that comes from the environment what the config says, by its place.

    What was read is written nowhere from then on (`store.secrets.never_write`). Raises InputError for a setting that
    has to be written as it is.
    """
    read: list[tuple[str, str]] = []  # values, and the interpolations that gave them
    instead: dict[Place, str] = {}

    def env(key: str, default: Any = ABSENT) -> str | None:
        value = oc.env(key) if default is ABSENT else oc.env(key, default)
        if key in os.environ:
            read.append((os.environ[key], f"${{oc.env:{key}}}"))
        return value

    def of_hydra(place: str) -> Any:  # Hydra's own settings can hold copies of variables
        settings: Any = HydraConfig.get()
        value = OmegaConf.select(settings, place)
        read.append((str(value), f"${{hydra:{place}}}"))
        return value

    def plain(node: Any, place: Place) -> Any:
        if isinstance(node, DictConfig):
            return {key: part(node, key, (*place, str(key))) for key in node}
        return [part(node, number, (*place, str(number))) for number in range(len(node))]

    def part(node: Any, key: Any, place: Place) -> Any:
        said, before = node._get_node(key)._value(), len(read)
        value = node[key]
        if len(read) == before:
            return plain(value, place) if isinstance(value, Container) else value
        if place[:2] == ("model", "config") or {*place[-2:]} & WRITTEN:
            raise InputError(f"{'.'.join(place)} = {said}: is written as it is, so it cannot come from the environment")
        instead[place] = str(said)
        if isinstance(value, Container):
            return OmegaConf.to_container(value, resolve=True)
        read.append((str(value), str(said)))
        if place[-1].endswith("file"):
            read.append((Path(str(value)).name, str(said)))
        return value

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    OmegaConf.register_new_resolver("hydra", of_hydra, replace=True)
    try:
        return plain(config, ()), instead
    finally:
        never_write(dict(reversed(read)))  # a variable by its own name, even where all of a setting is its value
