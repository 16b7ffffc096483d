"""`python -m cluscomp.command.convert FOLDER ...`: records of schema 1 become records of schema 2, in place.

Schema 2 tells the class of each part of the settings, and which yaml was chosen in each group. Schema 1 does not: the
yaml with the fewest differing settings is taken. Setting by setting what the older record says stays.
"""

import json
import sys
from pathlib import Path
from typing import Any

import hydra

from cluscomp.command.compose import CONF, told_in_a_sentence, written
from cluscomp.errors import InputError
from cluscomp.runs.experiment import Experiment
from cluscomp.store.files import new_file
from cluscomp.store.records import SCHEMA, read, to_json

# What a run did before there was the setting.
BEFORE: dict[str, Any] = {
    "weighting": "none", "assign": "nearest", "least_squares": 0, "descent": 0, "share": "none", "storage": "float16",
    "allocation": "uniform", "floor": 0.0, "measure": True,
    "damping": 0.01, "prefix": "original", "norms": False, "learns": "values", "codes": "fixed",
    "loss": "mse", "order": "fixed", "warmup": 0.0, "clip": None, "streams": "memory", "bos": False, "distance": False,
}  # fmt: skip
MEASURED = ("fill", "sensitivity")  # values of `allocation` under which `floor` says something
PARTS = {"data", "texts", "tasks", "instructions", "method", "data_root"}  # compared by themselves, or left out


def converted(values: dict[str, Any]) -> dict[str, Any]:
    """A record of schema 1, as JSON has it, as one of schema 2. Hydra has to be at work, as for `written`."""
    config = values["config"]
    choices: dict[str, Any] = {}
    for group, node in _nodes(config).items():  # methods last: some yaml choose block_finetune, too
        choices[group] = _choice(group, node, choices, config["order"])
    if (CONF / "experiment" / f"{config['name']}.yaml").is_file():
        choices["experiment"] = {"yaml": config["name"], "differs": {}}
    for group, node in _nodes(config).items():
        _add_class(node, _yaml(group, choices[group]["yaml"])["_target_"])
    if "data" in choices:
        _add_class_of_data(config, _yaml("data", choices["data"]["yaml"])["_target_"])
    _add_class(config, f"{Experiment.__module__}.{Experiment.__qualname__}")
    rest = {key: value for key, value in values.items() if key not in ("schema", "run", "config")}
    return {"schema": SCHEMA, "run": values["run"], "config": config, "choices": choices} | rest


def _nodes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a record's settings by the group that they are from, stages before the method."""
    stages, evaluate = config["stages"], config["evaluate"]
    texts = {f"data@evaluate.texts.{name}": text for name, text in evaluate.get("texts", {}).items()}
    learned = [stage["data"] for stage in stages.values() if "data" in stage]
    data = texts.pop("data@evaluate.texts.data", evaluate.get("data")) or next(iter(learned), None)
    method = stages.get("cluster", {}).get("method")
    instructions = stages.get("finetune", {}).get("instructions")
    found = {key: config.get(key) for key in ("model", "tracker", "machine", "evaluate")} | texts
    found |= {"data": data, "instructions": instructions, "tasks": evaluate.get("tasks")} | stages | {"method": method}
    return {group: node for group, node in found.items() if node is not None}


def _yaml(group: str, name: str) -> dict[str, Any]:
    """What a yaml says of its group."""
    return dict(written(**{group: name})[group] if "@" not in group else _yaml(group.partition("@")[0], name))


def _choice(group: str, node: dict[str, Any], choices: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """The yaml that differs least; among equals one that chooses more, as the run has it, then the usual one."""
    kind = group.partition("@")[0]
    usual = written()
    found = []
    for name in sorted(path.stem for path in (CONF / kind).glob("*.yaml")):
        whole = written(**{kind: name})
        more = {key: value for key, value in whole.items() if key != kind and value != usual[key]}
        fits = all(
            order[: len(value)] == value if key == "order" else _yaml(key, choices[key]["yaml"]) == value
            for key, value in more.items()
            if key == "order" or key in choices
        )
        if fits:
            differs, missing = _compared(node, whole[kind])
            unlike = "learns" in differs, len(differs) + missing  # what is learned makes another method
            found.append((*unlike, -len(more), whole[kind] != usual[kind], name, differs))
    *_, name, differs = min(found, key=lambda one: one[:5])
    return {"yaml": name, "differs": differs}


def _compared(node: dict[str, Any], yaml: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Settings of a record that differ from a yaml's, and how many others one of both has alone."""
    differs, missing = {}, len(set(node.get("texts", {"data": ""})) ^ set(yaml["texts"])) if "texts" in yaml else 0
    floor = node.get("allocation", BEFORE["allocation"]) in MEASURED or "floor" in node
    for key in (node.keys() | yaml.keys()) - PARTS - {"_target_"}:
        value = node.get(key, BEFORE.get(key, ...))
        if str(yaml.get(key)).startswith("${") or (key == "floor" and not floor):
            continue
        if value is ... or key not in yaml:
            missing += 1
        elif value != yaml[key]:
            differs[key] = value
    return {key: differs[key] for key in yaml if key in differs}, missing


def _add_class(node: dict[str, Any], name: str) -> None:
    fields = dict(node)
    node.clear()
    node.update({"class": name} | fields)


def _add_class_of_data(values: dict[str, Any], name: str) -> None:
    """All stages of a run learn from the data set that the run names; each has its own copy of the settings."""
    for key, part in values.items():
        if isinstance(part, dict):
            _add_class_of_data(part, name)
            if key == "data" and "class" not in part:
                _add_class(part, name)


def main() -> None:
    """Convert all records of schema 1 in the folders that are named. Exit code 2 if there is nothing to read."""
    with told_in_a_sentence(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        paths = [path for folder in sys.argv[1:] for path in sorted(Path(folder).expanduser().glob("*.json"))]
        if not paths:
            raise InputError("python -m cluscomp.command.convert FOLDER ...: a folder with records")
        for path in paths:
            values = json.loads(path.read_text())
            if values.get("schema") == 1:
                with new_file(path) as unfinished:
                    unfinished.write_text(to_json(converted(values)) + "\n")
                    read(unfinished)
                print(path)


if __name__ == "__main__":
    main()
