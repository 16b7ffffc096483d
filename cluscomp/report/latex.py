"""Tables as LaTeX that can be read on a printed page: what does not fit into one goes on in the next."""

import textwrap
from collections.abc import Callable, Sequence

WIDTH = 96  # letters of \scriptsize in a line of article's text (345 pt)
GAP = 2  # letters between two columns
LINES = 46  # of \scriptsize on a page, below head and caption
EMPTY = ("–", "")  # cells without which a row of one of several tables can do
HELD = 8  # tables in a row: LaTeX holds back a few dozen at most
WIDEST = 26  # letters of a column; longer texts go on in a further line
FITTED = "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%\n"  # no wider than the page's text
SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
} | {letter: rf"\{letter}" for letter in "&%$#_{}"}  # fmt: skip


def latex(
    names: Sequence[str], rows: Sequence[Sequence[str]], bold: set[tuple[int, int]], right: Sequence[bool], title: str
) -> str:
    """Tables, for booktabs and graphicx, of these columns: one, or as many as it takes to stay readable.

    Args:
        names: the columns' heads.
        rows: the cells' texts.
        bold: row and column of cells in bold.
        right: which columns hold numbers, and are set to the right.
        title: the caption; texts that all rows share move from their column into it.

    The text columns before the first number name the rows, so they stand in each table; rows with nothing else in one
    of several tables are left out there.
    """
    same = [c for c in range(len(names)) if not right[c] and len(rows) > 1 and len({row[c] for row in rows}) == 1]
    same = same if len(same) < len(names) else same[1:]
    kept = [c for c in range(len(names)) if c not in same]
    caption = ", ".join([title, *(f"{names[c]}: {rows[0][c]}" for c in same)])
    first = next((i for i, c in enumerate(kept) if right[c]), len(kept))
    widths = {c: _width(names[c], [row[c] for row in rows], right[c]) for c in kept}
    parts = _parts(kept[first:], lambda c: widths[c] + GAP, WIDTH - sum(widths[c] + GAP for c in kept[:first]))
    tables = [
        _table(names, [*kept[:first], *columns], rows, some, bold, right)
        for columns in parts
        for some in _parts(
            [r for r, row in enumerate(rows) if len(parts) == 1 or any(row[c] not in EMPTY for c in columns)],
            lambda r: _height([rows[r][c] for c in kept]),
            LINES,
        )
    ]
    captions = [caption, *[f"{title}, continued"] * (len(tables) - 1)]
    begin = "\\begin{table}[!htbp]\n\\centering\\scriptsize\\setlength{\\tabcolsep}{3pt}\n"
    floats = [f"{begin}\\caption{{{_escaped(told)}}}\n{table}\\end{{table}}\n" for told, table in zip(captions, tables)]
    held = ["\n".join(floats[start : start + HELD]) for start in range(0, len(floats), HELD)]
    return "% \\usepackage{booktabs,graphicx}\n" + "\\clearpage\n\n".join(held)


def _table(
    names: Sequence[str],
    columns: Sequence[int],
    rows: Sequence[Sequence[str]],
    some: Sequence[int],
    bold: set[tuple[int, int]],
    right: Sequence[bool],
) -> str:
    """The tabular of some columns and rows."""

    def line(cells: list[str]) -> str:
        return " & ".join(cells) + " \\\\\n"

    head = line([_cell(names[c], "b", "r" if right[c] else "l", 12) for c in columns])
    marks = [[r"\bfseries " * ((r, c) in bold) + _cell(rows[r][c], "t", "l", WIDEST) for c in columns] for r in some]
    sides = "".join("r" if right[c] else "l" for c in columns)
    body = "".join(map(line, marks))
    return (
        f"{FITTED}\\begin{{tabular}}{{{sides}}}\n\\toprule\n{head}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}}}\n"
    )


def _parts(items: Sequence[int], size: Callable[[int], int], room: int) -> list[list[int]]:
    """Items in groups whose sizes fill the room, one at least; an empty group where there are none."""
    found: list[list[int]] = [[]]
    left = room
    for item in items:
        if found[-1] and size(item) > left:
            found.append([])
            left = room
        found[-1].append(item)
        left -= size(item)
    return found


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _width(name: str, cells: list[str], number: bool) -> int:
    """Letters of a column as it is set."""
    texts = [*_lines(name, 12), *(cells if number else [line for cell in cells for line in _lines(cell, WIDEST)])]
    return max(map(len, texts))


def _height(cells: list[str]) -> int:
    return max(len(_lines(cell, WIDEST)) for cell in cells)


def _cell(text: str, at: str, side: str, width: int) -> str:
    """A text, in several lines where it is wider; `at` says whether the first (t) or the last (b) is the row's."""
    lines = [_escaped(line) for line in _lines(text, width)]
    stacked = r" \\ ".join(lines)
    return lines[0] if len(lines) == 1 else f"\\begin{{tabular}}[{at}]{{@{{}}{side}@{{}}}}{stacked}\\end{{tabular}}"


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)
