"""The commands that run nothing: status and collect of a sweep, table and plot of records."""

import sys
from pathlib import Path

from cluscomp.cells import Cell, collect, read_cells, status_table
from cluscomp.errors import InputError
from cluscomp.records import Record, read_folder


def status(arguments: list[str]) -> None:
    """Print what the cells of a sweep do. Exit code 1 unless all are finished."""
    name, given = named("status", arguments, {"outputs": "outputs"})
    show_cells(read_cells(place(given["outputs"]), name))


def collected(arguments: list[str]) -> None:
    """Copy the records of a finished sweep of a clean commit to results/NAME."""
    name, given = named("collect", arguments, {"outputs": "outputs", "publish": "results"})
    for path in collect(read_cells(place(given["outputs"]), name), place(given["publish"]) / name):
        print(path)


def table(arguments: list[str]) -> None:
    """Write all tables of an experiment's records into results/NAME; into=FILE also puts one into a document."""
    from cluscomp import published, report
    from cluscomp.rendering import FORMATS

    name, given = named("table", arguments, {"published": "false", "format": "md", "results": "results", "into": ""})
    results = place(given["results"])
    format_ = next((one for one in FORMATS if one == given["format"]), None)
    if format_ is None:
        raise InputError(f"format={given['format']}: allowed here: {', '.join(FORMATS)}")
    if given["published"] not in ("true", "false"):
        raise InputError(f"published={given['published']}: true or false")
    found = _records(results, name)
    beside = published.read_folder(results / "published") if given["published"] == "true" else None
    if beside is not None and not any(view.name == "published" for view, _ in report.views(found, beside)):
        print(
            "no published numbers of these models under these protocols (a whole text at the context papers use, all "
            "rows of the five zero-shot tasks)",
            file=sys.stderr,
        )
    files = report.page(name, found, format_, beside)
    for path in report.write(files, results / name):
        print(path)
    if given["into"]:
        report.put_into(place(given["into"]), name, found)
        print(given["into"])


def plot(arguments: list[str]) -> None:
    """Draw an experiment's figures into results/NAME, as PDF and PNG."""
    from cluscomp import plots, report

    name, given = named("plot", arguments, {"results": "results"})
    results = place(given["results"])
    figures = report.figures(_records(results, name))
    if not figures:
        raise InputError(f"{results / name}: its records hold nothing to draw")
    for stem, (figure, data) in figures.items():
        for path in plots.save(figure, results / name / stem, data):
            print(path)


def _records(results: Path, name: str) -> list[Record]:
    """The records of an experiment. Raises InputError, with the experiments there are, if it has none."""
    if not any((results / name).glob("*.json")):
        others = sorted({path.parent.name for path in results.glob("*/*.json")} - {"bench"})
        raise InputError(f"no records in {results / name}; there are some of: {', '.join(others) or 'none'}")
    return read_folder(results / name)


def show_cells(cells: dict[Path, Cell]) -> None:
    """Print what the cells of a sweep do. Exit code 1 unless all are finished."""
    print(f"\n{status_table(cells).to_markdown(index=False)}\n")
    undone = sum(cell.state != "finished" for cell in cells.values())
    if undone:
        print(
            f"{undone} of {len(cells)} cells are not finished; the sweep's command goes on with them", file=sys.stderr
        )
        sys.exit(1)


def named(command: str, arguments: list[str], options: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A name and what is given after it as key=value, or as it is by default. Raises InputError for anything else."""
    name, *rest = arguments or [""]
    given = dict(item.partition("=")[::2] for item in rest)
    if not name or "=" in name or not given.keys() <= options.keys():
        usage = " ".join(f"[{key}={value}]" for key, value in options.items())
        raise InputError(f"cluscomp {command} NAME {usage}: NAME is the `name` of an experiment")
    return name, options | given


def place(value: str) -> Path:
    """A folder or file that is named on the command line."""
    return Path(value).expanduser()
