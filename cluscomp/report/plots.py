"""Figures that a paper can print, from the data frames of the tables; one style for all of them."""

import itertools
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from cluscomp.report.learned import TRAINING
from cluscomp.report.pareto import BITS, BYTES, standing
from cluscomp.report.tables import IN_DOMAIN, PERPLEXITY
from cluscomp.store.files import new_file
from cluscomp.store.records import content_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's colours, which people with colour-blindness tell apart; the markers tell the same without any colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p"]
GREY = "#9A9A9A"
NAMED = 6  # methods with a colour and a name
DOTS = 12  # points of a line that are told apart
WIDTH = 25  # letters in each line of a name at a line's end
PANEL = 3.6, 2.8  # inches
SMALL_PANEL, NAMES = (1.6, 2.4), 1.7  # inches of a panel without names at its lines' ends, and of the names
ALIKE = 0.02  # of a size: a smaller range is not spread over a whole panel
BEYOND = 10  # times the median perplexity of a Pareto front, above which nothing is told apart
STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "lines.linewidth": 1.2, "lines.markersize": 5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 200,
    "text.parse_math": False, "pdf.fonttype": 42, "svg.hashsalt": "cluscomp",
}  # fmt: skip
UNITS = {BITS: "stored bits per weight of the linear layers", BYTES: "weights on disk, MB"}


class Picture(Figure):
    """A figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        import matplotlib as mpl

        content = BytesIO()
        with mpl.rc_context(STYLE):
            self.savefig(content, format="png", dpi=STYLE["figure.dpi"])
        return content.getvalue()


@contextmanager
def _panels(
    rows: int, columns: int, size: tuple[float, float] | None = None, *, sharey: bool = False
) -> "Iterator[tuple[Figure, list[list[Axes]]]]":
    """A figure of panels in the style, without a window; `size` in inches, None: that of its panels."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with mpl.rc_context(STYLE):
        figure = Picture(figsize=size or (PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False, sharey=sharey)]


def pareto(table: pd.DataFrame, originals: pd.DataFrame | None = None) -> "Figure":
    """Perplexity against bits and bytes, from `pareto.pareto`: a line a method; a row of panels a data set.

    The six methods that stand best (`pareto.standing`) have colours and their names at the lines' ends, all others are
    thin and grey; points of trained models are open, and each number of tokens has a line of its own.
    `originals` (columns model, data, value and `BITS`) are dashed lines. Perplexities of more than ten times the median
    of what nothing dominates tell nothing: such points stand on the panel's upper edge.
    """
    from matplotlib.ticker import MaxNLocator

    beyond, table = False, _told_apart(table)
    before = pd.DataFrame(columns=["model", "data"]) if originals is None else originals
    sets = list(dict.fromkeys(zip(table["model"], table["data"])))
    methods = standing(table)
    colours = dict(zip(methods, COLOURS[:NAMED]))
    trained = set(table[table[TRAINING] > 0]["method"]) if TRAINING in table else set()
    with _panels(len(sets), 2) as (figure, panels):
        for (model, data), row in zip(sets, panels):
            here = table[(table["model"] == model) & (table["data"] == data)]
            for axes, size, dominated in zip(row, (BITS, BYTES), ("dominated by bits", "dominated by bytes")):
                top = BEYOND * here[~here[dominated]][PERPLEXITY].median()
                beyond |= bool((here[PERPLEXITY] > top).any())
                shown = here.assign(**{PERPLEXITY: here[PERPLEXITY].clip(upper=top)})
                lines = {method: rows.groupby(size)[PERPLEXITY].mean() for method, rows in shown.groupby("method")}
                ends = _lines(axes, lines, methods, colours, trained)
                known = before[(before["model"] == model) & (before["data"] == data)]
                if len(known):
                    axes.axhline(
                        known["value"].iloc[0], color="black", linestyle="--", linewidth=0.8,
                        label=f"original, {known[BITS].iloc[0]:.3g} bits",
                    )  # fmt: skip
                axes.set_yscale("log")
                if (here[PERPLEXITY] > top).any():
                    axes.set_ylim(top=top)
                _logarithmic(axes.yaxis, axes.get_ylim())
                low, high = axes.get_xlim()
                if (lacking := ALIKE * high - (high - low)) > 0:
                    axes.set_xlim(low - lacking / 2, high + lacking / 2)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.set_xlabel(UNITS[size])
                axes.set_title(f"{model}, {data}{_domain(here[IN_DOMAIN])}")
                _name_ends(axes, ends, colours)
            row[0].set_ylabel(f"{PERPLEXITY} (log)")
        if len(methods) > NAMED:
            panels[0][0].plot([], [], "o-", color=GREY, linewidth=0.6, markersize=2, label="others (see the table)")
        if trained:
            panels[0][0].plot([], [], "o", color=GREY, markerfacecolor="white", label="open: trained after compression")
        if beyond:
            panels[0][0].plot([], [], " ", label="on the upper edge: beyond the scale")
        handles, labels = panels[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _told_apart(table: pd.DataFrame) -> pd.DataFrame:
    """The same with methods that were trained on several numbers of tokens told apart by these."""
    if TRAINING not in table:
        return table
    several = table.groupby("method")[TRAINING].transform("nunique") > 1
    named = table["method"] + table[TRAINING].map(" ({:,.0f} tokens)".format)
    return table.assign(method=table["method"].where(~several, named))


def _lines(
    axes: "Axes", lines: dict[str, pd.Series], methods: list[str], colours: dict[str, str], trained: set[str]
) -> dict[str, tuple[float, float]]:
    """A line for each method, best first, that has values by size; returns the ends of those with a colour.

    Long lines have no dots.
    """
    ends = {}
    for method in reversed(methods):  # the best are drawn last
        if method not in lines:
            continue
        line, colour = lines[method], colours.get(method)
        width, dot = (1.4, 3.5) if colour else (0.6, 2)
        look: dict[str, Any] = {"color": colour or GREY, "linewidth": width, "markersize": dot}
        look |= {"markerfacecolor": "white"} if method in trained else {}
        axes.plot(line.index, line, "o-" if len(line) <= DOTS else "-", clip_on=False, **look)[0].set_in_layout(False)
        if colour:
            ends[method] = line.index[-1], line.iloc[-1]
    return ends


def _name_ends(
    axes: "Axes",
    ends: dict[str, tuple[float, float]],
    colours: dict[str, str],
    *,
    line: float = 0.085,
    room: bool = False,
) -> None:
    """Names right of the panel, in the order of their lines' ends and as near as they can be.

    A name has three lines at most, each `line` of the panel high, two where three do not fit. With `room` they stand
    where another panel could.
    """
    axes.autoscale_view()
    place = axes.transData + axes.transAxes.inverted()
    heights = {name: min(max(float(place.transform(end)[1]), 0.0), 1.0) for name, end in ends.items()}
    names = sorted(heights, key=lambda name: heights[name])
    for most in (3, 2):
        wrap = textwrap.TextWrapper(WIDTH, max_lines=most, placeholder=" ...", break_on_hyphens=False)
        texts = [wrap.fill(name) for name in names]
        breaks = [text.count("\n") for text in texts]
        gaps = [0.0, *(line / 2 * (2 + sum(pair)) for pair in itertools.pairwise(breaks))]  # to the one below
        if sum(gaps) <= 1:
            break
    told: list[float] = []
    thread = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
    for name, gap in zip(names, gaps):  # from below, each above the one before
        told.append(max(heights[name], told[-1] + gap if told else 0.0))
    for number in range(len(told) - 2, -1, -1):  # and back from the upper edge
        told[number + 1] = min(told[number + 1], 1.0 - sum(gaps[number + 2 :]))
        told[number] = min(told[number], told[number + 1] - gaps[number + 1])
    for name, text, height in zip(names, texts, told):
        axes.annotate(
            text, ends[name], (1.06, height),
            textcoords="axes fraction", va="center", color=colours[name], fontsize=7,
            arrowprops=thread | {"color": colours[name]}, annotation_clip=False,
        ).set_in_layout(not room)  # fmt: skip


def _domain(learned_from: pd.Series) -> str:
    """What a panel's title says of methods that learned from its data."""
    return f"\n({IN_DOMAIN}{'' if learned_from.all() else ' of some'})" if learned_from.any() else ""


def _logarithmic(axis: "Axis", ends: tuple[float, float]) -> None:
    """Plain numbers on a logarithmic axis, at least three of them whatever its `ends` are.

    Within a decade they are those of a linear axis, within three 1, 2 and 5 of each, above that the decades.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    span = ends[1] / ends[0]
    if span < 10:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    elif span < 1000:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def layers(table: pd.DataFrame, column: str = "relative error") -> "Figure":
    """A value of every block's layers, from `by_layer.layer_table`: a panel for each kind of layer, a line a run.

    Six runs have colours, and names at their lines' ends in the last panel of each row: those of the least error at the
    size at which most were made, then at the next such size. All others are thin and grey. Errors have one scale.
    """
    from matplotlib.ticker import MaxNLocator

    table = table[table[column].notna()]
    sizes = table["limit"].map(lambda limit: limit + " bits" * limit[:1].isdigit())
    models = table["model"] + ", " if table["model"].nunique() > 1 else ""
    table = table.assign(run=models + sizes + ": " + table["method"])
    runs, logarithmic = _by_error(table, column), column == "relative error"
    colours = dict(zip(runs, COLOURS[:NAMED]))
    kinds = list(dict.fromkeys(table["layer"]))
    columns = min(4, max(1, len(kinds)))
    rows = max(1, math.ceil(len(kinds) / columns))
    size = SMALL_PANEL[0] * columns + NAMES, SMALL_PANEL[1] * rows
    with _panels(rows, columns, size, sharey=logarithmic) as (figure, panels):
        flat = [axes for row in panels for axes in row]
        for number, (axes, kind) in enumerate(zip(flat, kinds), 1):
            here = table[table["layer"] == kind].groupby("run")
            ends = _lines(axes, {name: run.groupby("block")[column].mean() for name, run in here}, runs, colours, set())
            axes.set_title(kind)
            axes.set_xlabel("block")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if number % columns == 1 or columns == 1:
                axes.set_ylabel(column + " (log)" * logarithmic)
            if logarithmic:
                axes.set_yscale("log")
                _logarithmic(axes.yaxis, axes.get_ylim())
            if number % columns == 0 or number == len(kinds):
                _name_ends(axes, ends, colours, line=0.07, room=number % columns > 0)
        for axes in flat[len(kinds) :]:
            axes.remove()
        if len(runs) > NAMED:
            flat[0].plot([], [], color=GREY, linewidth=0.6, label=_others(table, runs))
            figure.legend(*flat[0].get_legend_handles_labels(), loc="outside lower center")
    return figure


def _by_error(table: pd.DataFrame, column: str) -> list[str]:
    """The runs of `layers`: those of the size at which most were made first, and of one size the least error first."""
    value = "relative error" if "relative error" in table else column
    means = table.groupby(["limit", "run"])[value].mean().reset_index()
    means["rivals"] = means.groupby("limit")["run"].transform("size")
    return means.sort_values(["rivals", "limit", value], ascending=[False, True, True])["run"].tolist()


def _others(table: pd.DataFrame, runs: list[str]) -> str:
    """One line on the grey ones among the `runs`: methods without a colour, and those that have one at another size."""
    named = table["run"].isin(runs[:NAMED])
    known, grey = set(table[named]["method"]), set(table[~named]["method"])
    told = sorted(grey - known, key=str.casefold) + ["those named at other sizes"] * bool(grey & known)
    return textwrap.shorten("grey: " + ", ".join(told), 5 * WIDTH, placeholder=" ...")


def predictions(table: pd.DataFrame) -> "Figure":
    """Measured against planned seconds and memory, from `tables.prediction_table`; on the line the plan was right."""
    with _panels(1, 2) as (figure, panels):
        for axes, quantity, unit in zip(panels[0], ("seconds", "GiB"), ("time, seconds", "peak RAM, GiB")):
            kinds = table["stage"].map(lambda name: name.split(" ")[0])
            for number, kind in enumerate(dict.fromkeys(kinds)):
                here = table[kinds == kind]
                colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
                axes.plot(here[f"{quantity} planned"], here[quantity], marker, color=colour, label=kind)
            both = pd.concat([table[quantity], table[f"{quantity} planned"]])
            ends = [both.min() * 0.8, both.max() * 1.25]
            axes.plot(ends, ends, color=GREY, zorder=1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            _logarithmic(axes.xaxis, axes.get_xlim())
            _logarithmic(axes.yaxis, axes.get_ylim())
            axes.set_xlabel(f"planned {unit}")
            axes.set_ylabel(f"measured {unit}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def save(figure: "Figure", stem: Path, table: pd.DataFrame) -> list[Path]:
    """Write a figure as PDF and PNG, whole or not at all; the PNG tells from which data (`data_key`)."""
    import matplotlib as mpl

    told = {"pdf": {"Keywords": data_key(table), "CreationDate": None}, "png": {"Description": data_key(table)}}
    paths = []
    for kind, metadata in told.items():
        path = stem.with_suffix(f".{kind}")
        with mpl.rc_context(STYLE), new_file(path) as unfinished:
            figure.savefig(unfinished, format=kind, metadata=metadata)
        paths.append(path)
    return paths


def data_key(table: pd.DataFrame) -> str:
    """A hash of what a figure shows, to six digits."""
    return content_key(table.to_csv(index=False, float_format="%.6g"))
