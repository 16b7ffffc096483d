"""Yaml and overrides to checked settings; what was wrong, in a sentence. No Hydra past this room."""

import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from cluscomp.command.environment import Place, resolved
from cluscomp.command.idle import GROUPS, refuse_idle, tell_idle
from cluscomp.command.trust import Given, at, check, given, refuse_hydra, settings_class
from cluscomp.command.usage import choices, commands, settings_of_no_group
from cluscomp.errors import InputError
from cluscomp.process import INTERRUPTED, join_slurm, rank, unreadable
from cluscomp.runs.experiment import Experiment, put
from cluscomp.store.secrets import Discreet, hide, printable

log = logging.getLogger("cluscomp")
EXTRAS = {"optuna": "search", "submitit_local": "cluster", "submitit_slurm": "cluster"}  # by Hydra's own choices
HERE = Path(__file__).parents[1]
CONF = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())
SHARED = (*GROUPS, "data_root", "debug", "trust")  # used by settings, not by the run itself


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Turn an exception into one sentence and an exit code, unless debug=true asks for all of it.

    What the encoding of stdout does not have is written as \\xe9 and the like.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output has had enough (`| head`); nothing more is to be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if "debug=true" in map(str.lower, sys.argv):
            raise
        message, code = explain(error)
        print(f"cluscomp: {printable(' '.join(hide(message).splitlines()))}", file=sys.stderr)
        sys.exit(code)


def compose_for(command: Callable[[Experiment], float | None]) -> None:
    """Compose the settings (of every cell, with -m) and hand them on; what comes back goes to Hydra's sweeper."""
    if any(item.startswith("--e") for item in sys.argv[1:]):  # as argparse takes it
        raise InputError("--experimental-rerun: reads a pickle, which can run code; give the settings themselves")
    check_processes()
    _groups_by_name(sys.argv[1:])
    said = given(sys.argv[1:])  # here, for a launcher may run `compose` in a process of another command line
    parts = {"commands": commands, "choices": lambda: choices(CONF), "settings": lambda: settings_of_no_group(CONF)}
    for name, told in parts.items():  # ${cluscomp.commands:} and the like in conf/hydra/help, the text of --help
        OmegaConf.register_new_resolver(f"cluscomp.{name}", functools.partial(_escaped, told), replace=True)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def compose(config: DictConfig) -> float | None:
        with told_in_a_sentence():  # before Hydra sees it, which would add lines of its own
            experiment = build(config, HydraConfig.get().runtime.choices, said)
            join_slurm()
            quiet_libraries()
            tell_idle(OmegaConf.to_container(config), experiment, said)
            return command(experiment)
        return None

    compose()


def _escaped(told: Callable[[], str]) -> str:
    """A part of --help, as Hydra's template takes it."""
    return told().replace("$", "$$")


def composed(overrides: list[str], said: Given | None = None) -> Experiment:
    """The settings that overrides make, without a run of Hydra's own around them.

    `said`: what the user typed. Pass it when `overrides` come from a file; default: the overrides themselves. Raises
    InputError, in a sentence, for settings that cannot be composed or cannot work.
    """
    _groups_by_name(overrides)
    try:
        refuse_hydra(overrides)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = hydra.compose("config", overrides=overrides, return_hydra_config=True)
            chosen = config.hydra.runtime.choices
            with open_dict(config):
                del config["hydra"]
            return build(config, chosen, given(overrides) if said is None else said)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)[0]) from error


def check_processes() -> None:
    """Raise InputError for what torchrun would not set."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not os.environ.get(name, "0").isdecimal():
            raise InputError(
                f"{name}={os.environ[name]} in the environment: torchrun sets a whole number there; unset it"
            )


def _groups_by_name(items: Iterable[str]) -> None:
    """Raise InputError for a list or a dictionary in the place of a group's choice, on which Hydra stumbles."""
    for item in items:
        group, _, value = item.partition("=")
        if value[:1] in ("[", "{") and (CONF / group).is_dir():
            raise InputError(f"{item}: a group takes the name of a choice; the choices are in --help")


def build(config: DictConfig, chosen: Mapping[str, str | None], said: Given) -> Experiment:
    """The checked, immutable settings of a run. Raises InputError that names key, value and what is allowed.

    `chosen` names the yaml of each group, as Hydra does: evaluate: perplexity, data@evaluate.texts.c4: c4_sample.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{missing[0]} is required: give {missing[0]}=...")
    raw: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    values, read = resolved(config)
    check(values, said)
    if values["data_root"] is not None and not Path(str(values["data_root"])).expanduser().is_dir():
        raise InputError(f"data_root={values['data_root']}: there is no such folder")
    stages = [key for key, value in values.items() if _is_stage(key, value, said)]
    by_method = {key for key in stages if values[key].get("method")}
    if not isinstance(values["order"], list):
        raise InputError(f"order = {values['order']}: give a list of stages, order=[{values['order'] or 'cluster'}]")
    if values["order"] == ["evaluate"]:  # nothing is compressed, so nothing has to be said of how
        values = {key: value for key, value in values.items() if key not in {"method", *stages}}
    elif set(values["order"]) <= {*stages, "evaluate"} and not by_method & set(values["order"]):
        values = {key: value for key, value in values.items() if key not in {"method", *by_method}}
    shared_first = sorted(values, key=lambda key: key not in SHARED)  # so that an error names the group it stands in

    def built(value: Any, place: Place) -> Any:
        if isinstance(value, list):
            return [built(part, (*place, str(number))) for number, part in enumerate(value)]
        if not isinstance(value, dict):
            return value
        parts = {key: built(part, (*place, str(key))) for key, part in value.items() if key != "_target_"}
        return made(value["_target_"], place, parts) if "_target_" in value else parts

    def made(target: str, place: Place, parts: dict[str, Any]) -> Any:
        try:
            return settings_class(target, ".".join(place), said.modules)(**parts)
        except ValidationError as error:
            raise InputError(_told(error, place, raw, read)) from error

    parts = {key: built(values[key], (key,)) for key in shared_first}
    settings = {key: value for key, value in parts.items() if key not in {*SHARED, *stages}}
    for place, text in read.items():
        put(values, place, text)  # from here on values are what is written
    choices = _choices(chosen, raw, values)  # after what tells most mistakes, for it takes as long as all before
    stages_ = {key: parts[key] for key in stages if key in parts}
    refuse_idle(values["order"], parts)
    try:
        return Experiment(stages=stages_, choices=choices, from_environment=read, **settings)
    except ValidationError as error:
        raise InputError(_told(error, (), raw, read)) from error


def _is_stage(key: str, node: Any, said: Given) -> bool:
    """Whether a node of the settings is of a class of stages, ours or the user's."""
    if not isinstance(node, dict) or "_target_" not in node:
        return False
    settings = settings_class(node["_target_"], key, said.modules)
    return hasattr(settings, "takes") and hasattr(settings, "gives")


def _choices(chosen: Mapping[str, str | None], raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """For each group its yaml, and the settings that differ from it, by dotted name, as they are resolved.

    They are compared as they are written, so that `bits: ${bits}` is no difference.
    """
    options = {group: option for group, option in chosen.items() if option and not group.startswith("hydra/")}
    plain = {group: option for group, option in options.items() if "@" not in group and group != "experiment"}
    usual = written(**plain)
    found: dict[str, Any] = {}
    for group, option in options.items():
        kind, _, place = group.partition("@")
        place = place or group
        node, value = at(raw, place), at(values, place)
        yaml = written(f"{kind}/{option}").get(kind) if "@" in group else usual.get(kind)
        inside = [other.partition("@")[2] for other in options if "@" in other and other != group]
        if value is None and group != "experiment":  # nothing is compressed
            continue
        differs = {
            key: at(value, key)
            for key in _differing(node or {}, yaml or {})
            if not any(f"{place}.{key}.".startswith(f"{one}.") for one in inside)
        }
        found[group] = {"yaml": option, "differs": differs}
    return found


@functools.cache
def written(name: str = "config", **options: str) -> dict[str, Any]:
    """What yaml files say, unresolved: all of them with these choices of groups, or one alone (evaluate/gptq_2048).

    Hydra has to be at work, on the command line or by `hydra.initialize_config_dir`.
    """
    entries = OmegaConf.load(CONF / "config.yaml").defaults
    known = {str(group) for entry in entries if isinstance(entry, DictConfig) for group in entry}
    overrides = [f"{'' if group in known else '+'}{group}={option}" for group, option in sorted(options.items())]
    return dict(OmegaConf.to_container(hydra.compose(name, overrides=overrides)))  # type: ignore[arg-type]


def _differing(node: dict[str, Any], yaml: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what a node says otherwise than a yaml."""
    found = []
    for key, value in node.items():
        other = yaml.get(key, ...)
        if isinstance(value, dict) and isinstance(other, dict):
            found += _differing(value, other, f"{prefix}{key}.")
        elif value != other:
            found.append(f"{prefix}{key}")
    return found


def _told(error: ValidationError, prefix: Place, raw: dict[str, Any], read: dict[Place, str]) -> str:
    """Each wrong setting as `key = value: what is allowed`; a value taken from another key is named by that key."""
    sentences = []
    for problem in error.errors():
        path = (*prefix, *map(str, problem["loc"]))
        node = at(raw, ".".join(path))
        taken_from = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        name = taken_from[1] if taken_from else ".".join(path)
        message = problem["msg"].removeprefix("Value error, ")
        whole = problem["type"] in {"value_error", "missing"}
        value = "" if whole else f" = {read.get(path) or repr(problem['input'])}"
        message += f": {name}=[{problem['input']}]" if problem["type"] == "list_type" else ""
        sentences.append(f"{name}{value}: {message}" if name else message)
    return "; ".join(sentences)


def explain(error: BaseException, given: Sequence[str] | None = None) -> tuple[str, int]:
    """One sentence for an exception, and the exit code; `given` are the overrides, by default the command line's."""
    given = sys.argv[1:] if given is None else given
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, 130
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition_problem(error, given), 2
    if str(error).startswith("Config group override must be"):
        empty = [item for item in given if (CONF / item.partition("=")[0]).is_dir()]
        return f"{', '.join(empty)}: a group takes the name of a choice; the choices are in --help", 2
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"failed: {place}{error.strerror or error}", 1
    first_line = (str(error).splitlines() or [""])[0]
    why = unreadable() if isinstance(error, ImportError) else ""
    return f"failed: {type(error).__name__}: {first_line}{why} (debug=true shows where)", 1


def _composition_problem(error: BaseException, given: Sequence[str]) -> str:
    """Hydra's complaint in a sentence, with the nearest key that exists."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return (
            f"{error.override}: not to be read as a setting ({text.splitlines()[0]}); a value with =, commas or spaces "
            f"needs quotes inside of the shell's: \"{key}='{value}'\""
        )
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        *parents, wrong = override[1].split(".")
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            chosen = [item for item in given if re.fullmatch(r"[\w/]+=[\w/]+", item)]
            groups = [item for item in chosen if (CONF / f"{item.replace('=', '/')}.yaml").is_file()]
            node = hydra.compose("config", overrides=groups)
        for parent in parents:
            node = node.get(parent) if isinstance(node, DictConfig) else None
        keys = sorted(str(key) for key in node) if isinstance(node, DictConfig) else []
        keys = [key for key in keys if key != "_target_"]
        near = difflib.get_close_matches(wrong, keys, 1)
        hint = f"did you mean {'.'.join([*parents, near[0]])}? " if near else ""
        others = [path.stem for path in (CONF / parents[0]).glob("*.yaml") if _has(path, wrong)] if parents else []
        hint = hint or (f"it is one of {parents[0]}={min(others, key=len)}; " if others else "")
        return f"{override[1]}: there is no such setting; {hint}allowed here: {', '.join(keys) or 'nothing'}"
    option = re.search(
        r"Could not find '([^']+)'\s+Available options in '([\w/]+)':\s+(.*?)\s+Config search", text, re.S
    )
    if option:
        group, names = option[2], option[3].split()
        given_name = option[1].removeprefix(f"{group}/")
        near = difflib.get_close_matches(given_name, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        if group == "model" and ("/" in given_name or Path(given_name).is_dir()):
            hint = f"a model of the hub or a folder is given as model=hub model.id={given_name}; "
        elif group == "data" and ("/" in given_name or Path(given_name).exists()):
            hint = (
                f"a text file is data=text data.file={given_name}, rows or a data set data=hub data.id={given_name}; "
            )
        elif given_name in EXTRAS:
            hint = f"it comes with pip install 'cluscomp[{EXTRAS[given_name]}]'; "
        return f"{group}={given_name}: there is no such choice; {hint}allowed here: {', '.join(names)}"
    plugin = re.search(r"Could not load '\w+/\w+/(\w+)'", text)
    if plugin and plugin[1] in EXTRAS:
        return f"{plugin[1]}: it comes with pip install 'cluscomp[{EXTRAS[plugin[1]]}]'"
    if missing := re.search(r"Missing mandatory value: ([\w.]+)", text):  # that another setting takes
        return f"{missing[1]} is required: give {missing[1]}=..."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines).replace("\t", " ")


def _has(yaml: Path, key: str) -> bool:
    """Whether a choice of a group has this setting."""
    return re.search(rf"^{re.escape(key)}:", yaml.read_text(), re.M) is not None


def quiet_libraries() -> None:
    """Our own lines on the terminal, from other libraries only errors."""
    import transformers

    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(Discreet("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[terminal])
    logging.getLogger("cluscomp").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
