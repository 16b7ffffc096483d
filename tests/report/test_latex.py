"""Tables as LaTeX: what moves where, and no line beyond the text's width when TeX sets them."""

import shutil
import subprocess

import pandas as pd
import pytest

from cluscomp.report.latex import LINES, latex
from cluscomp.report.rendering import rendered

WIDE = pd.DataFrame(
    {
        "model": ["Some-Model_7B"] * 70,
        "method": [f"method {i} (a_setting=one, another=two) + recover" for i in range(70)],
        **{f"{i} bits: some_text (partial)": [float(i)] * 69 + [None] for i in range(14)},
        "only one": [None] * 69 + [3.0],
    }
)


def test_what_does_not_fit_goes_on_in_further_tables():
    text = rendered(WIDE, "latex", title="50% of_it", scores=["only one"])
    tables = text.split(r"\begin{table}")[1:]
    assert r"\caption{50\% of\_it, model: Some-Model\_7B}" in tables[0] and "Some-Model" not in "".join(tables[1:])
    assert all(r"\caption{50\% of\_it, continued}" in table for table in tables[1:])
    for i in range(14):  # each column stands in one part, of three pages or four
        assert text.count(rf"{{@{{}}r@{{}}}}{i} bits: \\ some\_text") in (3, 4)
    rows = [table.split(r"\midrule")[1].count("method ") for table in tables]
    assert max(rows) <= LINES and sum(rows) > 70  # each table names its rows
    assert "method 69" in tables[-1] and sum("method 69" in table for table in tables) < len(tables) / 2


def test_one_row_keeps_its_columns_and_special_letters_are_text():
    text = latex(["a", "b"], [["x_1", "100% & <c> \\ {d} ~ ^ # $"]], {(0, 1)}, [False, False], "one")
    assert r"\caption{one}" in text and r"x\_1" in text
    special = (
        r"\bfseries 100\% \& \textless{}c\textgreater{} \textbackslash{} \{d\} \textasciitilde{} "
        r"\textasciicircum{} \# \$"
    )
    assert special in text and text.count(r"\begin{table}") == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_tex_sets_them_without_a_line_that_is_too_long(tmp_path):
    body = rendered(WIDE, "latex", title="wide") + rendered(WIDE.head(3).iloc[:, :4], "latex", title="narrow")
    head = "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n"
    (tmp_path / "page.tex").write_text(f"{head}{body}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout and "too large" not in done.stdout
