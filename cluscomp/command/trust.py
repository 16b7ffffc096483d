"""What settings may build and run: nothing but the project's classes, unless the command line itself says more.

A yaml, an experiment, a folder of them (--config-dir) or a record may come from anybody. Names are checked before
anything is imported; what is imported then has to be a class, and of an allowed module.
"""

import importlib
import pickle
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Any

from hydra._internal import hydra as hydra_itself
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cluscomp.errors import InputError

OWN = ("cluscomp",)
# Hydra's plugins, and the samplers that its Optuna plugin takes
OF_HYDRA = (*OWN, "hydra._internal.core_plugins", "hydra.experimental", "hydra_plugins", "optuna.samplers")
PLUGINS = {"hydra_plugins.hydra_ray_launcher": "ray", "hydra_plugins.hydra_submitit_launcher": "cluster"}  # our extras
LOGGERS = ("logging.StreamHandler", "logging.NullHandler", "logging.Formatter")  # which open no file and no connection
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
LOGGING = ("job_logging", "hydra_logging")
COMMANDS = ("hydra.job.env_set", "hydra.launcher.setup")  # variables and shell lines under which a run works
TASKS = "include_path"  # a folder of task files, which name functions of their own


@dataclass(frozen=True)
class Given:
    """What the command line itself says: the modules it trusts, and the names of all settings on it."""

    trusted: tuple[str, ...]
    keys: frozenset[str]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose classes settings may be of."""
        return (*OWN, *self.trusted)


def given(items: Iterable[str]) -> Given:
    """What is said by the arguments of a command. Raises InputError for a `trust` that names no modules."""
    found = [match for item in items if (match := re.match(r"\+*([\w./@-]+)=", item)) and not item.startswith("-")]
    trusted: list[str] = []
    for item in (match.string for match in found if match[1] == "trust"):
        value: Any = OverridesParser.create().parse_overrides([item])[0].value()
        trusted = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name) for name in trusted):
            raise InputError(f"{item}: give the name of a module, or trust=[ONE,OTHER]")
    return Given(tuple(trusted), frozenset(match[1] for match in found))


def check(values: dict[str, Any], said: Given) -> None:
    """Raise InputError, with place and value, if settings would build or run what only the command line can allow."""
    names = values.get("trust")
    if tuple([] if names is None else [names] if isinstance(names, str) else names) != said.trusted:
        raise InputError(f"trust = {names}: modules are trusted on the command line alone (trust=NAME), by no file")
    for place, target in _targets(values):
        _check_name(place, target, said.modules)
    told = [at(values, key) for key in said.keys if key.endswith(f".{TASKS}")]
    for place, folder in _values(values, TASKS):
        if folder is not None and folder not in told:
            raise InputError(f"{place} = {folder}: task files can run code; give it on the command line itself")


def settings_class(target: str, place: str, modules: Sequence[str]) -> type:
    """The class of settings that `_target_` names at a place of the settings.

    Raises InputError if it is of no allowed module, is not there, or is no class of settings.
    """
    found = _class(target, place, modules)
    if not is_dataclass(found):
        raise InputError(f"{place}._target_ = {target}: not a class of settings (@settings)")
    return found


_CELLS: dict[str, bytes] = {}  # composed settings of this process' cells, pickled: 6 ms in the place of 250
_FILES: dict[str, bytes] = {}  # what this process' files of settings say, pickled likewise


def _keep(kept: dict[str, bytes], key: str, value: Any) -> None:
    with suppress(pickle.PicklingError, AttributeError, TypeError):  # in a launcher's job, which has one cell
        kept[key] = pickle.dumps(value)


class Once(ConfigRepository):
    """Reads each file once in a process, which composes its settings at least twice (`compose.written`)."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """What the first of the folders searched that has such a file says there."""
        key = repr(([source.path for source in self.sources], config_path))
        found: ConfigResult | None
        if key in _FILES:
            found = pickle.loads(_FILES[key])
            return found
        found = super().load_config(config_path)
        _keep(_FILES, key, found)
        return found


class Careful(ConfigLoaderImpl):
    """Hydra's reader of settings, which looks at Hydra's own nodes before Hydra builds anything of them."""

    def __init__(self, config_search_path: Any) -> None:
        super().__init__(config_search_path)
        self.repository = Once(config_search_path)
        self.said = given(sys.argv[1:])  # goes with the reader to the processes of a launcher

    def load_configuration(self, *arguments: Any, **named: Any) -> DictConfig:
        """The settings of a run or sweep. Raises InputError for what Hydra may not build or run."""
        config = super().load_configuration(*arguments, **named)
        if named.get("from_shell", True):  # else they are composed alone, and Hydra builds nothing of them
            check_hydra(config, self.said)
        if config.hydra.job.env_set and RunMode.MULTIRUN in (*arguments, *named.values()):
            raise InputError("hydra.job.env_set: a sweep would write it into its files; set variables in the shell")
        return config

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The settings of a cell. Each is composed once, though Hydra asks again when it launches what it checked."""
        given_hydra = OmegaConf.to_container(master_config.hydra.overrides.hydra)
        key = repr((str(self.config_search_path), given_hydra, sweep_overrides))
        if key in _CELLS:
            config: DictConfig = pickle.loads(_CELLS[key])
            OmegaConf.copy_cache(from_config=master_config, to_config=config)
            return config
        config = super().load_sweep_config(master_config, sweep_overrides)
        _keep(_CELLS, key, config)
        return config

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: Any, repo: Any) -> None:
        loaded = None if config_name is None else repo.load_config(config_path=config_name)
        for folder in (loaded and OmegaConf.select(loaded.config, "hydra.searchpath")) or ():
            if not str(folder).startswith("file://") and "://" in str(folder):  # pkg:// imports the package
                raise InputError(f"hydra.searchpath = {folder}: only folders, as file://FOLDER")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


hydra_itself.ConfigLoaderImpl = Careful  # type: ignore[attr-defined]


def check_hydra(config: DictConfig, said: Given) -> None:
    """As `check`, of what Hydra itself builds: launcher, sweeper, callbacks, handlers of log lines."""
    node: Any = OmegaConf.to_container(config.hydra, resolve=False)
    modules = (*OF_HYDRA, *said.trusted)
    for place, target in _targets(node, "hydra"):
        _class(target, place, modules)
    for key in LOGGING:
        for place, value in _leaves(node.get(key), f"hydra.{key}"):
            named = place.endswith((".()", ".class"))
            fits = value in LOGGERS or _is_of(value, modules) if named else value in STREAMS or "://" not in value
            if not fits or "${" in value:
                raise InputError(f"{place} = {value}: allowed here: {', '.join((*LOGGERS, *STREAMS))}")
    for place in COMMANDS:
        value = OmegaConf.select(config, place)
        if value and not any(f"{key}.".startswith(f"{place}.") for key in said.keys):
            raise InputError(f"{place}: no file can set it; give it on the command line itself")


def refuse_hydra(overrides: Sequence[str]) -> None:
    """Raise InputError for overrides of Hydra's own settings, where they may come from a file."""
    for one in OverridesParser.create().parse_overrides(list(overrides)):
        if one.is_hydra_override() or one.key_or_group == "hydra":
            raise InputError(f"{one.input_line}: a setting of Hydra's own, which has no place here")


def _class(target: Any, place: str, modules: Sequence[str]) -> type:
    _check_name(place, target, modules)
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        extra = next((extra for plugin, extra in PLUGINS.items() if module.startswith(plugin)), None)
        hint = "" if extra is None else f"; it comes with pip install 'cluscomp[{extra}]'"
        raise InputError(f"{place}._target_ = {target}: {error}{hint}") from error
    if not isinstance(found, type) or not _is_of(f"{found.__module__}.{found.__name__}", modules):
        raise InputError(f"{place}._target_ = {target}: not a class of {', '.join(modules)}")
    return found


def _check_name(place: str, target: Any, modules: Sequence[str]) -> None:
    if not _is_of(target, modules):
        root = str(target).partition(".")[0]
        raise InputError(
            f"{place}._target_ = {target}: settings build only classes of {', '.join(modules)}; if you trust that "
            f"module and what it imports, say so on the command line: trust={root}"
        )


def _is_of(target: Any, modules: Sequence[str]) -> bool:
    return isinstance(target, str) and any(target.startswith(f"{module}.") for module in modules)


def _targets(node: Any, place: str = "") -> list[tuple[str, Any]]:
    return [(where.removesuffix("._target_"), target) for where, target in _values(node, "_target_", place)]


def _values(node: Any, name: str, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of this name, with its dotted place."""
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, part in parts:
        where = f"{place}.{key}" if place else str(key)
        if key == name:
            yield where, part
        yield from _values(part, name, where)


def _leaves(node: Any, place: str) -> Iterator[tuple[str, str]]:
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, part in parts:
        yield from _leaves(part, f"{place}.{key}")
    if isinstance(node, str):
        yield place, node


def at(values: Any, place: str) -> Any:
    """What stands in a dictionary of dictionaries at a dotted name, or None."""
    for part in place.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
