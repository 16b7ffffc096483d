"""All tables of one experiment: what applies to its records, and where it is written."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import pandas as pd

from cluscomp.errors import InputError
from cluscomp.report import by_layer, comparison, learned, names, pareto, tables
from cluscomp.report.published import Published
from cluscomp.report.rendering import SUFFIX, Format, as_text, on_one_line, rendered
from cluscomp.store.files import new_file
from cluscomp.store.records import Record

STEM = "tables"


@dataclass(frozen=True)
class View:
    """One table: what makes it of records, what has to be known to read it, and where the best is bold.

    One that `ranks` models is made for each text that they learned from.
    """

    name: str
    title: str
    make: Callable[[list[Record]], pd.DataFrame]
    note: str = ""
    within: Sequence[str] = ()
    scores: Callable[[pd.DataFrame], list[str]] = field(default=lambda _: [])
    highest: bool = False
    ranks: bool = False


def _several_seeds(records: list[Record]) -> pd.DataFrame:
    several = len({record.config["seed"] for record in records}) > 1
    return pareto.seed_spread(records) if several else pd.DataFrame()


def _codebooks(records: list[Record]) -> pd.DataFrame:
    """Rows of which the use of centroids is known: records tell of it since they hold `distribution_by_layer`."""
    table = by_layer.codebook_table(records)
    return table if table.empty else table[table["entropy"].notna()]


SEEDS = 3  # that a recipe needs whose K-means starts at random points: its scores differ by more than 10 % over them


def of_enough_seeds(records: list[Record]) -> tuple[list[Record], list[str]]:
    """Records that may stand in a table, and the names of methods that may not, with their limits of bits.

    K-means from random points, as the paper has it, ends elsewhere with each seed, so one seed says little of it.
    """

    def recipe(record: Record) -> tuple[str, str, str] | None:
        method = record.config["stages"].get("cluster", {}).get("method", {})
        if not str(method.get("init")).endswith("_points"):
            return None
        return (
            names.model_name(record, records),
            names.method_name(record, record.config["order"][-1]),
            names.limit(record),
        )

    seeds: dict[tuple[str, str, str], set[int]] = {}
    for record in records:
        if key := recipe(record):
            seeds.setdefault(key, set()).add(record.config["seed"])
    few = {key for key, found in seeds.items() if len(found) < SEEDS}
    limits = {name: ", ".join(sorted(limit for _, other, limit in few if other == name)) for _, name, _ in sorted(few)}
    return [one for one in records if recipe(one) not in few], [f"{name} at {at}" for name, at in limits.items()]


LIKE = ("model", "limit", learned.TRAINING)
BOLD = "The best at each limit of bits is bold, among rows that were trained on equally many tokens"
VIEWS = [
    View(
        "perplexity", "Perplexity", comparison.perplexity_table,
        f"{BOLD}, and on texts of their domain only where there is no other. Minutes are those of all stages up to the "
        "row's, without evaluation.",
        LIKE, comparison.ranked_columns, ranks=True,
    ),
    View(
        "summary", "The best at a glance", comparison.summary_table,
        "On the texts by which methods are ranked, the first rows of the table below.",
        ("model", learned.TRAINING), comparison.ranked_columns, ranks=True,
    ),
    View(
        "overview", "Perplexity at each limit of bits", comparison.overview_table,
        "At or under the limit as stored, the best bold as above; of several seeds the mean.",
        ("model", learned.TRAINING), comparison.ranked_columns, ranks=True,
    ),
    View(
        "zeroshot", "Tasks, accuracy in percent", comparison.zeroshot_table, f"{BOLD}.",
        LIKE, comparison.ranked_columns, True, ranks=True,
    ),
    View(
        "finetuning", "Finetuning on a task", comparison.finetuning_table,
        "Before: after the stage before finetuning. Held-out loss: of answers the run did not train on.",
    ),
    View(
        "pareto", "Who wins at which size", pareto.pareto,
        "Dominated: another row of the same data is no larger and no worse, and better in one of both. In-domain: the "
        "method learned from that data set.",
        ranks=True,
    ),
    View(
        "seeds", "Spread over seeds", _several_seeds,
        "Within the spread: the distance to the best is no more than what seeds make, so it says nothing.",
        ranks=True,
    ),
    View(
        "weights", "Weights and errors by kind of layer", by_layer.weight_table,
        "Errors are squared error over squared size of the weights; methods that look at inputs do not minimise that.",
    ),
    View(
        "codebooks", "Use of centroids by kind of layer", _codebooks,
        "Dead: used by no code; rare: by less than a tenth of the mean number. Entropy in bits a code.",
    ),
    View("cost", "Cost by stage", tables.cost_table),
    View("plan", "Planned and measured", tables.prediction_table, "Ratios are measured over planned."),
]  # fmt: skip


def views(records: list[Record], published: list[Published] | None = None) -> list[tuple[View, pd.DataFrame]]:
    """Every table that these records fill, with published numbers beside ours if there are any to compare with.

    Recipes of too few seeds are left out, see `of_enough_seeds`; what learned from unlike texts is ranked in tables of
    its own. Raises InputError for scores under unlike protocols.
    """
    records, _ = of_enough_seeds(records)
    texts = learned.by_text(records)
    apart = texts if len(texts) > 1 else {}
    found = []
    for view in VIEWS:
        alike = {text: same for text, same in apart.items() if view.ranks}
        found += [(_of_text(view, text), view.make(same)) for text, same in alike.items()]
        found += [] if alike else [(view, view.make(records))]
    if published is not None:
        beside = View(
            "published", "Beside published numbers", lambda records: comparison.comparison_table(records, published),
            "Ours stands beside a number of the same model, text, context and method, and of the same bits to 0.06.",
        )  # fmt: skip
        found.insert(0, (beside, beside.make(records)))
    return [(view, table) for view, table in found if len(table)]


def _of_text(view: View, text: str) -> View:
    name = re.sub(r"\W+", "_", text)
    return replace(view, name=f"{view.name}_{name}", title=f"{view.title}, learned from {on_one_line(text)}")


def page(name: str, records: list[Record], format_: Format, published: list[Published] | None = None) -> dict[str, str]:
    """The files with all tables of an experiment, by name: one, or of CSV one for each table.

    Raises InputError if nothing was scored, or nothing that may stand in a table.
    """
    if not any(record.scores for record in records):
        raise InputError(f"{name}: its records hold no score (evaluate.after=[]), of which a table could be made")
    enough, few = of_enough_seeds(records)
    left_out = f"Left out, for K-means from random points needs {SEEDS} seeds: {'; '.join(few)}." if few else ""
    if not any(record.scores for record in enough):
        raise InputError(f"{name}: nothing is left for a table. {left_out} Run it with seed=0,1,2")
    made = views(records, published)
    parts = {}
    for view, table in made:
        heading = f"{name}: {view.title}"
        text = rendered(
            table, format_, title="" if format_ == "md" else heading, within=view.within, scores=view.scores(table),
            highest=view.highest,
        )  # fmt: skip
        notes = [
            *filter(None, (view.note, left_out if view.scores(table) else "")),
            *tables.legend(table),
        ]
        if format_ == "md":
            text = f"## {as_text(view.title)}\n\n{text}\n" + "".join(f"{note}  \n" for note in notes)
        if format_ == "html":
            text += "".join(f"<p>{escape(note)}</p>\n" for note in notes)
        parts[view.name] = text
    if format_ == "csv":
        return {f"{name_}.csv": text for name_, text in parts.items()}
    head = {"md": f"# {name}\n\nMade by `cluscomp table {name}` from the records beside this file.\n\n", "latex": ""}
    safe = escape(name)
    begin = f'<!doctype html>\n<meta charset="utf-8">\n<title>{safe}</title>\n'
    html_head = f"{begin}<style>{CSS}</style>\n<h1>{safe}</h1>\n"
    return {f"{STEM}.{SUFFIX[format_]}": head.get(format_, html_head) + "\n".join(parts.values())}


CSS = (
    "body { font-family: sans-serif; margin: 2em; } table { border-collapse: collapse; margin-top: 2em; } "
    "caption { text-align: left; font-weight: bold; padding: 0.3em; } "
    "th, td { padding: 0.2em 0.7em; } th { border-bottom: 1px solid; } tr:last-child td { border-bottom: 1px solid; }"
)


def write(files: dict[str, str], folder: Path) -> list[Path]:
    """Write files, each whole or not at all. Raises OSError if that cannot be done."""
    for name, text in files.items():
        with new_file(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def put_into(document: Path, name: str, records: list[Record]) -> None:
    """Put an experiment's table between `<!-- cluscomp table NAME VIEW -->` and `<!-- end -->`, for what is there.

    Without VIEW (perplexity, overview, ...: the files' names in format=csv) it is the first one. Raises InputError if
    the document has no such place, or the records no such table.
    """
    made = views(records)
    known = {view.name: (view, table) for view, table in made}

    def filled(place: re.Match[str]) -> str:
        if place["view"] and place["view"] not in known:
            raise InputError(f"{document}: {name} has no table '{place['view']}'; it has {', '.join(known)}")
        view, table = known[place["view"]] if place["view"] else made[0]
        text = rendered(table, "md", within=view.within, scores=view.scores(table), highest=view.highest)
        return f"{place['begin']}{text}{place['end']}"

    begin, end = f"<!-- cluscomp table {name} -->", "<!-- end -->"
    places = rf"(?P<begin><!-- cluscomp table {re.escape(name)}(?: (?P<view>\w+))? -->\n).*?(?P<end>{end})"
    after, count = re.subn(places, filled, document.read_text(encoding="utf-8"), flags=re.S)
    if not count:
        raise InputError(f"{document}: there is no place for the table, {begin} and {end}")
    with new_file(document) as unfinished:
        unfinished.write_text(after, encoding="utf-8")
