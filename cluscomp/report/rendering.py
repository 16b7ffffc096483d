"""Tables as Markdown, LaTeX, HTML or CSV: numbers rounded alike, the best in bold, what is missing shown as missing."""

import html
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from tabulate import tabulate

from cluscomp.report.latex import latex
from cluscomp.store.secrets import printable

Format = Literal["md", "latex", "html", "csv"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIX = {"md": "md", "latex": "tex", "html": "html", "csv": "csv"}
MISSING = "–"
WIDEST = 190  # letters of a line of Markdown whose cells are padded
DIGITS = {  # by a column's whole name
    r"[\w. ']*bits|bits in memory": 3,
    r"(relative )?error|error of .*|kurtosis|outliers|dead|rare|entropy": 4,
    r"MB|MB to deploy|minutes|(CPU )?seconds|seconds planned|seconds, ratio": 1,
    r"centroids|seeds|[\w. ]*tokens": 0,
}


def rendered(
    table: pd.DataFrame,
    format_: Format,
    *,
    title: str = "",
    within: Sequence[str] = (),
    scores: Sequence[str] = (),
    highest: bool = False,
) -> str:
    """A table in a format. Of each column of `scores` the best of the rows that agree in `within` are bold.

    Best is the smallest, or with `highest` the largest; a group of one row has no best, and the original takes no
    part. CSV has all digits, no bold and empty cells where something is missing; so it can be read again. In HTML the
    title names a table's styles: two tables of one page need two. Records may come from anybody: in each format names
    are text and nothing else (in CSV a text that a spreadsheet would compute begins with an apostrophe).
    """
    table = _on_one_line(table)
    if format_ == "csv":
        return _texts(table, _inert).to_csv(index=False, lineterminator="\n")
    names = list(map(str, table.columns))
    kinds = {name: "" if name in scores else name for name in names}  # a score's column has the name of its data set
    cells = pd.DataFrame({name: [shown(value, kinds[name]) for value in table[name]] for name in names})
    bold = _best(table, within, scores, max if highest else min)
    numeric = ["right" if pd.api.types.is_numeric_dtype(table[name]) else "left" for name in names]
    if format_ == "md":
        cells = _texts(cells, as_text)
        for row, column in bold:
            cells.iloc[row, column] = f"**{cells.iloc[row, column]!s}**"
        heading = f"**{as_text(title)}**\n\n" if title else ""
        return heading + _markdown(cells, numeric) + "\n"
    if format_ == "latex":
        return latex(names, cells.to_numpy().tolist(), bold, [side == "right" for side in numeric], title)
    style = (
        cells.style.hide(axis="index").set_uuid(re.sub(r"\W+", "-", title) or "table").set_caption(html.escape(title))
    )
    marks = pd.DataFrame("", cells.index, cells.columns)
    for row, column in bold:
        marks.iloc[row, column] = "font-weight: bold"
    aligned: Any = {name: [{"selector": "", "props": f"text-align: {side}"}] for name, side in zip(names, numeric)}
    style = style.apply(lambda _: marks, axis=None).set_table_styles(aligned)
    return style.format(escape="html").format_index(escape="html", axis=1).to_html() + "\n"


def _markdown(cells: pd.DataFrame, aligned: list[str]) -> str:
    """Cells of text as a table of Markdown; where it is too wide to be read as it stands, without padding."""
    padded = str(cells.to_markdown(index=False, disable_numparse=True, colalign=aligned))
    if padded.index("\n") <= WIDEST:
        return padded
    rule = ["--:" if side == "right" else ":--" for side in aligned]
    rows = [list(map(str, cells.columns)), rule, *cells.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def for_terminal(table: pd.DataFrame, width: int | None = None) -> str:
    """A table as it is printed, in Markdown's form, whatever names are in it.

    One that is wider than `width` letters has its columns narrowed: heads and cells go on in further lines.
    """
    cells = _on_one_line(table).astype(str)
    text = str(cells.to_markdown(index=False, disable_numparse=True))
    for column in (40, 30, 24, 18, 14, 11, 9, 7, 5):
        if width is None or max(map(len, text.splitlines())) <= width:
            break
        rows = [list(cells.columns), ["---"] * cells.shape[1], *cells.to_numpy().tolist()]  # a head would have margins
        text = tabulate(rows, tablefmt="plain", maxcolwidths=column, break_long_words=False, disable_numparse=True)
    return text


def as_text(value: str) -> str:
    """A text as Markdown shows it: no markup, no HTML, no end of a cell."""
    inside_words = r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # emphasise nothing
    escaped = re.sub(rf"[\\|`*\[\]~$]|{inside_words}", lambda found: f"\\{found[0]}", value)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def on_one_line(text: str) -> str:
    """A text with what would break a line or steer a terminal spelled out."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def _on_one_line(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `on_one_line` of all its texts and column names."""
    return _texts(table, on_one_line)


def _texts(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """The table with all its texts and column names changed; all else, types of columns too, stays."""
    found = table.copy()
    for number, name in enumerate(table.columns):
        if not pd.api.types.is_numeric_dtype(table[name]):
            values = [change(value) if isinstance(value, str) else value for value in table.iloc[:, number]]
            found.isetitem(number, np.array(values, dtype=object))
    return found.set_axis([change(str(name)) for name in table.columns], axis=1)


def _inert(text: str) -> str:
    """Text that a spreadsheet would take for a formula, as text."""
    return f"'{text}" if re.match(r"[=+@-].", text) else text


def shown(value: Any, column: str = "") -> str:
    """A cell as text: missing as a dash, large numbers short, digits by what the column holds."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool) or not isinstance(value, float):
        return {True: "yes", False: ""}[value] if isinstance(value, bool) else str(value)
    digits = next((digits for pattern, digits in DIGITS.items() if re.fullmatch(pattern, column)), 2)
    if math.isinf(value) or (abs(value) >= 1e5 and digits):
        return f"{value:.1e}" if math.isfinite(value) else "inf"
    return f"{value:.{digits}f}"


def _best(
    table: pd.DataFrame, within: Sequence[str], scores: Sequence[str], best_of: Callable[[list[float]], float]
) -> set[tuple[int, int]]:
    """Row and column of each cell that is best among its like."""
    within = [name for name in within if name in table.columns]
    groups = table.groupby(within, sort=False).indices.values() if within else [range(len(table))]
    methods = table["method"] if "method" in table.columns else pd.Series("", table.index)
    found = set()
    for column, name in enumerate(table.columns):
        if name not in scores:
            continue
        values = table[name].astype(float).where(methods != "original")
        for rows in groups:
            known = {int(row): value for row in rows if not math.isnan(value := values.iloc[int(row)])}
            if len(known) > 1:
                best = best_of(list(known.values()))
                found |= {(row, column) for row, value in known.items() if value == best}
    return found
