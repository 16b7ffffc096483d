"""What the commands are called and take: help of each, the choices there are, and the nearest to what was mistyped."""

import difflib
import itertools
import re
import shutil
import textwrap
from pathlib import Path

from omegaconf import OmegaConf

from cluscomp.errors import InputError

COMMENTS_AT = 23  # the column of comments in our yaml
COMMANDS = {
    "run": "[-m] [key=value ...]\n\nRun the stages in order and score the model (the word run may be left out); with "
    "-m and key=value,value a sweep, every combination. `cluscomp --help` shows all settings.",
    "plan": "[--calibrate] [key=value ...]\n\nBits, bytes, memory and time of a run, from shapes alone; nothing is "
    "downloaded. --calibrate measures this machine first, for this and later plans.",
    "status": "NAME [outputs=outputs]\n\nWhat the cells of the sweep NAME do (name=NAME in the command of the sweep).",
    "collect": "NAME [outputs=outputs] [publish=results]\n\nCopy the records of a finished sweep of a clean commit to "
    "results/NAME, where table and plot look for them.",
    "table": "NAME [format=md] [published=false] [results=results] [into=FILE]\n\nThe records in results/NAME as "
    "tables, written beside them. format: md, latex, html or csv. published=true puts published numbers beside them. "
    "into=FILE also puts one into a Markdown document, between <!-- cluscomp table NAME ... --> and <!-- end -->.",
    "plot": "NAME [results=results]\n\nThe records in results/NAME as figures, written beside them as PDF and PNG.",
    "verify": "RECORD [outputs=outputs] [full=false] [key=value ...]\n\nMeasure the models of a record's file again "
    "and compare; full=true makes them anew, too. Exit code 1 if a score is different.",
    "export": "CHECKPOINT format=NAME output=FOLDER [dtype=auto]\n\nWrite a checkpoint in another library's format: "
    "dense, gguf, vptq, gptq, compressed-tensors or aqlm; says what is lost. FOLDER must be new or empty.",
    "lm_eval": "ARGUMENTS\n\nlm-evaluation-harness' own command, which then knows our checkpoints as --model cluscomp "
    "--model_args pretrained=FOLDER.",
    "list": "[GROUP [CHOICE]]\n\nThe groups of settings and their choices; of one group each with a sentence; of "
    "one choice its settings, with a word on each.",
    "help": "[COMMAND]\n\nThe help of a command, or of all with the settings of a run.",
}


def help_of(command: str) -> str:
    """How a command is used, and what it does."""
    usage, _, sentences = COMMANDS[command].partition("\n\n")
    return _folded(usage, f"Usage:  cluscomp {command} ", " " * 12) + "\n\n" + _folded(sentences)


def commands() -> str:
    """How each command is used, with the first sentence on what it does."""
    lines = []
    for command, told in COMMANDS.items():
        usage, _, sentences = told.partition("\n\n")
        lines += [_folded(usage, f"  cluscomp {command} ", " " * 12), _folded(_first(sentences), " " * 6, " " * 6)]
    return "\n".join(lines)


def misused(command: str, what: str) -> InputError:
    """The refusal of a command's arguments: how it is used, followed by `what`, the part that was wrong."""
    return InputError(f"usage: cluscomp {command} {COMMANDS[command].partition(chr(10))[0]}: {what}")


def check_command(arguments: list[str]) -> None:
    """Raise InputError, with the nearest command, if the first argument is neither one nor a setting nor an option."""
    word = arguments[0] if arguments else "run"
    if word in COMMANDS or "=" in word or word.startswith(("-", "+", "~")):
        return
    near = difflib.get_close_matches(word, COMMANDS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"{word}: no command; {hint}there are {', '.join(COMMANDS)}. A setting is key=value")


def choices(conf: Path, group: str | None = None, choice: str | None = None) -> str:
    """The groups with their choices; the choices of one group with a sentence of each; or one choice, all of it."""
    found = {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }
    if group is None:
        return "\n".join(_folded(", ".join(options), f"{name}: ", "    ") for name, options in found.items())
    if group not in found:
        raise InputError(f"cluscomp list {group}: no group of settings; there are {', '.join(found)}")
    if choice is not None and choice not in found[group]:
        raise InputError(f"cluscomp list {group} {choice}: no such choice; there are {', '.join(found[group])}")
    if choice is not None:
        told = _folded(_comment(conf / group / f"{choice}.yaml"), "# ", "# ")
        of_choice = [line for lines in _settings(conf, group, choice).values() for line in lines]
        return "\n".join([told, *map(_with_comment, of_choice)])
    width = max(map(len, found[group])) + 2
    sentences = {name: said(conf / group / f"{name}.yaml") or "-" for name in found[group]}
    return "\n".join(_folded(text, f"{name:{width}}", " " * width) for name, text in sentences.items())


def settings_of_no_group(conf: Path) -> str:
    """The settings that are in no group, each with a word on it."""
    parts = _parts((conf / "config.yaml").read_text())
    return "\n".join(_with_comment(line) for key in parts if key not in ("defaults", "hydra") for line in parts[key])


def _settings(conf: Path, group: str, choice: str) -> dict[str, list[str]]:
    """The lines of each setting of a choice by its name, also of those that another choice's yaml says for it."""
    path = conf / group / f"{choice}.yaml"
    text = path.read_text()
    parts, of_all = _parts(text), "@package _global_" in text
    parts.pop("defaults", None)
    found: dict[str, list[str]] = {}
    for base in OmegaConf.to_container(OmegaConf.load(path)).get("defaults", []):  # type: ignore[union-attr]
        if not isinstance(base, str):  # a choice of another group
            ((other, option),) = base.items()
            other = other.removeprefix("override ").removeprefix("/")
            found[f"# {other}"] = [f"# {other if of_all else other.replace('@', f'@{group}.')}={option}"]
        elif base != "_self_":
            found |= _settings(conf, group, base.partition("@")[0])
    if of_all and group in parts:
        parts |= _parts(textwrap.dedent("\n".join(parts.pop(group)[1:])))
    for key, lines in parts.items():
        told = found.get(key, [""])[0].partition("# ")[2]  # the word that the other yaml has on it
        found[key] = [f"{lines[0]:<{COMMENTS_AT - 1}} # {told}", *lines[1:]] if told and "# " not in lines[0] else lines
    return found


def _parts(text: str) -> dict[str, list[str]]:
    """The lines of a yaml by the names that begin at its margin."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+):", line):
            found[match[1]] = lines = [line]
        elif line.strip() and found:
            lines.append(line)
    return found


def _folded(text: str, first: str = "", further: str = "") -> str:
    """A text in lines as wide as the terminal, which begin with `first` and with `further`."""
    columns = max(shutil.get_terminal_size((120, 24)).columns, len(further) + 40)
    return textwrap.fill(
        text, columns, initial_indent=first, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )


def _with_comment(line: str) -> str:
    """A line of a yaml; a comment at its end goes on below itself."""
    value, mark, comment = line.partition("# ")
    if len(value) > COMMENTS_AT + 20:
        return value.rstrip() + "\n" + _folded(comment, " " * COMMENTS_AT + mark, " " * COMMENTS_AT + mark)
    return _folded(comment, value + mark, " " * len(value) + mark) if mark else line


def said(path: Path) -> str:
    """The first sentence of the comment that a yaml begins with."""
    return _first(_comment(path))


def _first(text: str) -> str:
    """The first sentence of a text, without what ends it."""
    return re.split(r"(?<=[.?])\s", text, maxsplit=1)[0].rstrip(".:")


def _comment(path: Path) -> str:
    """The comment that a yaml begins with, in one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines if "@package" not in line)
