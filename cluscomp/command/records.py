"""The commands on what is there: status, collect, table, plot, verify, list; and lm-eval's own, with our models."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluscomp.command import trust
from cluscomp.command.compose import CONF, composed, quiet_libraries
from cluscomp.command.sweep import show_cells, show_table
from cluscomp.command.usage import choices, misused
from cluscomp.errors import InputError
from cluscomp.runs.cells import collect, read_cells
from cluscomp.runs.experiment import PLACES, config_of
from cluscomp.runs.verify import (
    changed,
    compare,
    explained,
    not_again,
    overall,
    overrides_of,
    quoted,
    scoring_alone,
    verdict_table,
)
from cluscomp.store.files import held_alone, writable
from cluscomp.store.records import NAME, Record, read, read_folder
from cluscomp.store.secrets import printable

log = logging.getLogger("cluscomp")


def status(arguments: list[str]) -> None:
    """Print what the cells of a sweep do. Exit code 1 unless all are finished."""
    name, given = parsed("status", arguments, {"outputs": "outputs"})
    show_cells(read_cells(place(given["outputs"]), name))


def collected(arguments: list[str]) -> None:
    """Copy the records of a finished sweep of a clean commit to results/NAME."""
    name, given = parsed("collect", arguments, {"outputs": "outputs", "publish": "results"})
    for path in collect(read_cells(place(given["outputs"]), name), place(given["publish"]) / name):
        print(path)


@contextmanager
def _of_whole_records() -> Iterator[None]:
    """Say that a record lacks something, or holds something else than a run writes there (InputError)."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise InputError(
            f"a record lacks or alters what tables and figures need ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}); leave out records that no run wrote (debug=true shows where)"
        ) from error


@_of_whole_records()
def table(arguments: list[str]) -> None:
    """Write all tables of an experiment's records into results/NAME; into=FILE also puts one into a document."""
    from cluscomp.report import page, published, rendering

    name, given = parsed("table", arguments, {"published": "false", "format": "md", "results": "results", "into": ""})
    results = place(given["results"])
    format_ = next((one for one in rendering.FORMATS if one == given["format"]), None)
    if format_ is None:
        raise InputError(f"format={given['format']}: allowed here: {', '.join(rendering.FORMATS)}")
    if given["published"] not in ("true", "false"):
        raise InputError(f"published={given['published']}: true or false")
    found = _records(results, name)
    beside = published.read_folder(results / "published") if given["published"] == "true" else None
    if beside is not None and not any(view.name == "published" for view, _ in page.views(found, beside)):
        print(
            "no published numbers of these models under these protocols (a whole text at the context papers use, all "
            "rows of the five zero-shot tasks)",
            file=sys.stderr,
        )
    files = page.page(name, found, format_, beside)
    for path in page.write(files, results / name):
        print(path)
    if given["into"]:
        page.put_into(place(given["into"]), name, found)
        print(given["into"])


@_of_whole_records()
def plot(arguments: list[str]) -> None:
    """Draw an experiment's figures into results/NAME, as PDF and PNG."""
    from cluscomp.report import figures, plots

    name, given = parsed("plot", arguments, {"results": "results"})
    results = place(given["results"])
    found = figures.figures(_records(results, name))
    if not found:
        raise InputError(f"{results / name}: its records hold nothing to draw")
    for stem, (figure, data) in found.items():
        for path in plots.save(figure, results / name / stem, data):
            print(path)


def _records(results: Path, name: str) -> list[Record]:
    """The records of an experiment. Raises InputError, with the experiments there are, if it has none."""
    if not any((results / name).glob("*.json")):
        others = sorted({path.parent.name for path in results.glob("*/*.json")} - {"bench"})
        raise InputError(
            f"no records in {results / name}; there are some of: {', '.join(others) or 'none'}. Runs with "
            f"publish={results} put theirs there, and so does `cluscomp collect` of a sweep"
        )
    return read_folder(results / name)


def choices_told(arguments: list[str]) -> None:
    """Print the groups of settings and their choices, the choices of one group, or the settings of one choice."""
    if len(arguments) > 2:
        raise InputError("cluscomp list [GROUP [CHOICE]]: more is given")
    print(choices(CONF, *arguments))


def lm_eval(arguments: list[str]) -> None:  # noqa: ARG001 (it reads sys.argv)
    """Hand on to lm-eval's own command, which then knows our checkpoints. Raises InputError if it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from cluscomp.score import harness  # noqa: F401 (which registers them)
    except ImportError as error:
        raise InputError("cluscomp lm_eval needs the package: pip install 'cluscomp[tasks]'") from error
    cli_evaluate()


def parsed(command: str, arguments: list[str], options: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A name and what is given after it as key=value, or as it is by default. Raises InputError for anything else."""
    name, *rest = arguments or [""]
    given = dict(item.partition("=")[::2] for item in rest)
    if not re.fullmatch(NAME, name) or not given.keys() <= options.keys():
        raise misused(command, f"NAME is the `name` of an experiment (cluscomp {command} --help)")
    return name, options | given


def place(value: str) -> Path:
    """A folder or file that is named on the command line."""
    return Path(value).expanduser()


def verify(arguments: list[str]) -> None:
    """Measure a record's models again, or with full=true make them anew, too. Exit code 1 if a score is different."""
    from cluscomp.runs.run import run

    given = dict(item.partition("=")[::2] for item in arguments[1:])
    if bare := [item for item in arguments[1:] if "=" not in item]:
        raise misused("verify", f"{bare[0]} is no key=value")
    said_full = given.get("full", "false").lower()
    if said_full not in ("true", "false"):
        raise misused("verify", f"full={given['full']}: true or false")
    full = said_full == "true"
    if not arguments or ("=" in arguments[0] and not place(arguments[0]).is_file()):
        raise misused("verify", "RECORD is a record's file")
    if place(arguments[0]).is_dir():  # of a checkpoint, say
        raise misused("verify", f"{arguments[0]} is a folder; RECORD is a record's file, outputs/run-KEY/record.json")
    record, outputs = read(place(arguments[0])), Path(given.get("outputs", "outputs")).expanduser().absolute()
    rest = [item for item in arguments[1:] if item.partition("=")[0] not in {"outputs", "full", "publish"}]
    places = [item for item in rest if item.partition("=")[0] in (*PLACES, "trust")]
    said = trust.given(arguments[1:])  # what the record's cell says is another's word
    overrides = [item for item in rest if item not in places] or overrides_of(record, outputs)
    quiet_libraries()
    now = composed([*overrides, *places], said)
    original = None
    if record.config["order"] and not full:
        with held_alone(cache := writable("cache", now.cache), "model"):
            original = now.model.folder(cache)
    places += ["publish=null", "tracker=none"]
    overrides = [item for item in overrides if not item.startswith("tracker")]
    with TemporaryDirectory(prefix="verify-", dir=writable("outputs", str(outputs))) as folder:
        places.append(f"outputs={quoted(folder)}")
        again, machine = [], {}
        for after in ["full"] if full else dict.fromkeys(score.after for score in record.scores):
            log.info("verify  %s", "all is made anew" if full else f"the model '{after}' is scored again")
            alone = [] if full else scoring_alone(record, after, outputs, original)
            kept = [item for item in overrides if not (item.startswith("model") and "model=hub" in alone)]
            made = run(composed([*kept, *alone, *places], said)).record
            again += made.scores if full else [replace(score, after=after) for score in made.scores]
            machine = made.machine
    show_table(verdict_table(record, again))
    if left := not_again(record, again):
        print(printable(f"not measured again: {', '.join(left)} (full=true does)\n"))
    found = compare(record.scores, again)
    for line in explained(found):
        print(printable(line))
    for line in changed(record, config_of(now), machine):
        print(f"not as it was: {printable(line)}")
    verdict = overall(found)
    print(f"{record.run['name']}: {verdict}")
    sys.exit(int(verdict == "different"))
