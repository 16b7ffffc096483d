"""Models are ranked among those that learned from the same text, by one that none of them learned from."""

from dataclasses import replace

import pandas as pd
import pytest
from test_page import run_of
from test_tables import score, size

from cluscomp.errors import InputError
from cluscomp.report import figures, page
from cluscomp.report.comparison import perplexity_table, ranked_columns, zeroshot_table
from cluscomp.report.learned import by_text, in_domain, learned_from, tokens
from cluscomp.report.pareto import pareto, seed_spread, standing
from cluscomp.report.tables import method_table
from cluscomp.store.records import EXTERNAL, Record

WIKITEXT = {"name": "wikitext2", "domain": "wikitext", "calibration": "train"}
C4 = {"name": "c4", "domain": "c4", "calibration": "train"}
BOTH = [WIKITEXT, C4]


def run_on(
    name: str, data: dict | None, wikitext2: float, c4: float, *, trained_on: dict | None = None, **of
) -> Record:
    """A run that looked at 8 windows of 512 tokens, and perhaps trained on two epochs of 1000, scored on two texts."""
    made = run_of(name, 1.0, **of)
    stages, last = made.config["stages"], "block_finetune" if trained_on else "cluster"
    stages["cluster"] |= {"data": data or WIKITEXT, "samples": 8, "length": 512}
    if data:
        made.stages["cluster"]["found"]["calibration"] = {"text": "its name in the record"}
    if trained_on:
        made.config["order"] = ["cluster", "block_finetune"]
        stages["block_finetune"] = {"data": trained_on, "epochs": 2}
        made.stages["block_finetune"] = {"size": size(3.0, 8.0, 1), "found": {"tokens": 1000, "calibration": {}}}
        made.run["seconds"]["block_finetune"], made.machine["peak_ram"]["block_finetune"] = 1.0, 1
    rows = [score("original", 10.0, dataset=one) for one in ("wikitext2", "c4")]
    return replace(made, scores=[*rows, score(last, wikitext2, dataset="wikitext2"), score(last, c4, dataset="c4")])


def test_what_a_model_learned_from_and_how_much():
    made = run_on("a", WIKITEXT, 20.0, 30.0, trained_on=C4)
    assert learned_from(made, "cluster") == "wikitext2/train"
    assert learned_from(made, "block_finetune") == "c4/train, wikitext2/train"
    assert tokens(made, "cluster") == {"calibration tokens": 4096, "training tokens": 0}
    assert tokens(made, "block_finetune") == {"calibration tokens": 4096, "training tokens": 2000}
    free = run_on("b", None, 20.0, 30.0, method="rtn")
    assert learned_from(free, "cluster") == learned_from(free, "original") == "" and tokens(free, "cluster") == {
        "calibration tokens": 0, "training tokens": 0,
    }  # fmt: skip


def test_what_a_stage_of_ones_own_trained_on_is_not_known():
    made = run_on("a", WIKITEXT, 20.0, 30.0)
    made.config["order"], made.stages["mine"] = ["cluster", "mine"], {"size": size(3.0, 8.0, 1)}
    assert pd.isna(tokens(made, "mine")["training tokens"])


def test_older_records_tell_of_a_data_set_that_they_learned_from_though_their_scores_do_not():
    made = run_on("a", WIKITEXT, 20.0, 30.0)
    assert [in_domain(made, one) for one in made.scores] == [False, False, True, False]


def test_models_of_unlike_texts_stand_in_tables_of_their_own():
    """What learned from nothing stands in both; a run whose stages learned from two texts is a third kind."""
    runs = [
        run_on("a", WIKITEXT, 20.0, 31.0), run_on("b", C4, 25.0, 28.0), run_on("c", None, 40.0, 50.0, method="rtn"),
        run_on("d", C4, 18.0, 24.0, trained_on=WIKITEXT),
    ]  # fmt: skip
    names = {text: [one.run["name"] for one in part] for text, part in by_text(runs).items()}
    assert names == {
        "c4/train": ["b", "c"], "c4/train, wikitext2/train": ["c", "d"], "wikitext2/train": ["a", "c"],
    }  # fmt: skip
    made = {view.name: (view.title, table) for view, table in page.views(runs[:3])}
    title, table = made["perplexity_c4_train"]
    assert title == "Perplexity, learned from c4/train"
    assert table["method"].tolist() == ["original", "ClusComp-", "RTN"]
    assert table["wikitext2"].tolist() == [10.0, 25.0, 40.0] and "c4 (in-domain)" in table
    assert "pareto_wikitext2_train" in made and "cost" in made and "perplexity" not in made
    assert "## Perplexity, learned from c4/train\n" in page.page("x", runs, "md")["tables.md"]


@pytest.mark.parametrize("table", [perplexity_table, zeroshot_table, pareto, seed_spread, method_table])
def test_a_table_that_ranks_takes_models_of_one_text(table):
    runs = [run_on("a", WIKITEXT, 20.0, 31.0), run_on("b", C4, 25.0, 28.0)]
    with pytest.raises(InputError, match=r"unlike texts \(c4/train; wikitext2/train\) cannot be ranked in one table"):
        table(runs)


def test_each_text_has_panels_of_its_own():
    figure, _ = figures.figures([run_on("a", WIKITEXT, 20.0, 31.0), run_on("b", C4, 25.0, 28.0)])["pareto"]
    assert [axes.get_title().split(", ", 1)[1] for axes in figure.axes[::2]] == [
        "c4\nlearned from c4/train\n(in-domain)", "wikitext2\nlearned from c4/train",
        "c4\nlearned from wikitext2/train", "wikitext2\nlearned from wikitext2/train\n(in-domain)",
    ]  # fmt: skip


def test_unlike_numbers_of_calibration_tokens_are_unlike_texts():
    """What was trained on the text, but not calibrated, stands with both."""
    runs = [run_on(name, WIKITEXT, 20.0, 31.0) for name in "ab"]
    runs[1].config["stages"]["cluster"]["samples"] = 16
    runs.append(run_on("c", None, 20.0, 31.0, trained_on=WIKITEXT, method="rtn"))
    assert {text: [one.run["name"] for one in part] for text, part in by_text(runs).items()} == {
        "wikitext2/train, 4096 tokens": ["a", "c"], "wikitext2/train, 8192 tokens": ["b", "c"],
    }  # fmt: skip
    assert [*by_text(runs[::2])] == ["wikitext2/train"]


def external(name: str, calibration: str | None) -> Record:
    made = run_on(name, None, 21.0, 32.0)
    made.config["order"] = []
    made.stages[EXTERNAL] = {
        "size": size(4.0, 8.0, 1),
        "found": {"method": "q4", "library": "x", "calibration": calibration},
    }
    return replace(made, scores=[replace(one, after=EXTERNAL) for one in made.scores if one.after != "original"])


def test_an_external_model_stands_with_the_domain_it_states_or_where_none_is_known_with_all():
    ours = [run_on("a", WIKITEXT, 20.0, 31.0), run_on("b", C4, 25.0, 28.0)]
    parts = by_text([*ours, external("stated", "wikitext"), external("unknown", None), external("third", "books")])
    assert {text: [one.run["name"] for one in part] for text, part in parts.items()} == {
        "books": ["unknown", "third"], "c4/train": ["b", "unknown"], "wikitext2/train": ["a", "stated", "unknown"],
    }  # fmt: skip
    table = perplexity_table([external("unknown", None), ours[0]])
    assert dict(zip(table["method"], table["learned from"]))["Q4 (x, external)"] == "unknown"


def test_methods_are_ranked_by_the_text_that_none_of_them_learned_from():
    """GPTQ is better on what both learned from, AWQ elsewhere; without another text the former has to do."""
    runs = [run_on("a", WIKITEXT, 20.0, 40.0, method="gptq"), run_on("b", WIKITEXT, 25.0, 30.0, method="awq")]
    table = perplexity_table(runs)
    assert table["method"].tolist() == ["original", "AWQ", "GPTQ"]
    assert ranked_columns(table) == ["c4"] and standing(pareto(runs)) == ["AWQ", "GPTQ"]
    text = page.page("x", runs, "md")["tables.md"]
    assert "**30.00**" in text and "**20.00**" not in text
    alone = [replace(one, scores=[row for row in one.scores if row.dataset != "c4"]) for one in runs]
    assert ranked_columns(perplexity_table(alone)) == ["wikitext2 (in-domain)"]
    assert standing(pareto(alone)) == ["GPTQ", "AWQ"]


def test_trained_and_untrained_models_are_told_apart():
    """The best among rows that were trained on as much; the points of trained ones are open."""
    runs = [
        run_on("a", WIKITEXT, 20.0, 40.0, method="gptq"), run_on("b", WIKITEXT, 19.0, 45.0, method="awq"),
        run_on("c", WIKITEXT, 18.0, 35.0, method="gptq", trained_on=WIKITEXT),
    ]  # fmt: skip
    table = perplexity_table(runs)
    assert table["training tokens"].tolist()[1:] == [2000, 0, 0] and set(table["calibration tokens"][1:]) == {4096}
    text = page.page("x", runs, "md")["tables.md"]
    assert "**40.00**" in text and "**35.00**" not in text and "training tokens: " in text
    figure, _ = figures.figures(runs)["pareto"]
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert faces.count("white") == 1
    assert "open: trained after compression" in [one.get_text() for one in figure.legends[0].get_texts()]
    spread = seed_spread([*runs, replace(runs[0], config=runs[0].config | {"seed": 1})])
    assert spread.query("data == 'c4'")["within the spread"].tolist() == ["best", "?", "best"]
