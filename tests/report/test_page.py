"""Tables and figures of experiments by hand, and that those in the repository are what the commands make today."""

import csv
import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_tables import asked, chosen, method_record, record, score, size, with_tasks

from cluscomp.command import records
from cluscomp.errors import InputError
from cluscomp.report import figures, page, plots
from cluscomp.report.by_layer import codebook_table, drift_table, layer_table, weight_table
from cluscomp.report.comparison import (
    comparison_table,
    finetuning_table,
    overview_table,
    perplexity_table,
    summary_table,
    zeroshot_table,
)
from cluscomp.report.learned import TRAINING
from cluscomp.report.names import method_name
from cluscomp.report.pareto import BITS, pareto, seed_spread, standing
from cluscomp.report.published import Published
from cluscomp.report.rendering import MISSING, for_terminal, rendered
from cluscomp.report.tables import prediction_table
from cluscomp.store.records import Record, Score, protocol, read_folder, write

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted({path.parent.name for path in (ROOT / "results").glob("*/*.json")} - {"bench"})
read_results = functools.cache(lambda name: read_folder(ROOT / "results" / name))
page_of = functools.cache(lambda name: page.page(name, read_results(name), "md")["tables.md"])
BLOCKS = re.compile(r"<!-- cluscomp table (\w+)(?: \w+)? -->\n(.*?)<!-- end -->", re.S)


def run_of(
    name: str, value: float, stored: float = 3.0, *, method: str = "cluscomp", bits: float = 3.0, seed: int = 0,
    file_size: int = 100_000_000, **protocol_,
) -> Record:  # fmt: skip
    """A run of stage cluster alone that scored one value."""
    made = record(name, [score("original", 20.0, **protocol_), score("cluster", value, **protocol_)])
    made.config.update(order=["cluster"], seed=seed)
    made.config["stages"]["cluster"]["method"]["bits"] = bits
    made.stages["cluster"].update(size=size(stored, 8.0, file_size))
    made.choices.update(chosen(method))
    made.run["seconds"], made.machine["peak_ram"] = {"cluster": 90.0}, {"cluster": 2**30}
    return made


def test_the_perplexity_table_by_hand():
    """The original once and first, then from many bits to few, the best first; what it cost beside it."""
    runs = [
        run_of("a", 60.0, method="rtn"), run_of("b", 30.0, method="gptq"),
        run_of("c", 22.0, 4.0, method="rtn", bits=4.0),
    ]  # fmt: skip
    table = perplexity_table(runs)
    assert list(table["method"]) == ["original", "RTN", "GPTQ", "RTN"]
    assert list(table["pydoc"]) == [20.0, 22.0, 30.0, 60.0]
    assert list(table["limit"]) == ["-", "4", "3", "3"]
    assert table["minutes"].tolist()[1:] == [1.5] * 3 and table["peak RAM, GiB"].tolist()[1:] == [1.0] * 3
    assert set(table["model"]) == {"Llama-2-7B"} and "settings" not in table and "seed" not in table


def test_a_model_that_two_runs_left_alike_stands_once_and_settings_are_told_of_one_method():
    runs = [run_of("a", 60.0, method="rtn"), run_of("b", 60.0, method="rtn"), run_of("c", 50.0, method="rtn")]
    for made, hash_, samples in zip(runs, ("x", "x", "y"), (1, 1, 2)):
        made.stages["cluster"]["checkpoint_hash"] = hash_
        made.config["stages"]["cluster"]["samples"] = samples
    runs.append(run_of("d", 30.0, method="gptq"))
    runs[3].config["stages"]["cluster"]["length"] = 7
    table = perplexity_table(runs)
    assert table["method"].tolist() == ["original", "GPTQ", "RTN", "RTN"]
    assert table["settings"].tolist() == ["", "", "cluster.samples=2", "cluster.samples=1"]


def test_what_was_not_measured_is_missing_and_never_zero():
    other = run_of("b", 30.0, method="gptq")
    other = replace(other, scores=[score("cluster", 31.0, dataset="c4", context=99)])
    table = perplexity_table([run_of("a", 60.0, method="rtn"), other])
    assert table["c4"].isna().sum() == 2 and table["pydoc"].isna().sum() == 1
    text = rendered(table, "md")
    assert MISSING in text and "nan" not in text.lower() and " 0.00" not in text


@pytest.mark.parametrize("name", ["my-tokens", "my tokens", "MB of text", "entropy", "seconds"])
def test_the_name_of_a_data_set_says_nothing_of_decimals(name):
    runs = [run_of("a", 30.256, method="rtn"), run_of("b", 31.256, method="gptq")]
    for one in runs:
        one.scores[:] = [replace(one_score, dataset=name) for one_score in one.scores]
    (text,) = page.page("mine", runs, "md").values()
    assert "**30.26**" in text and "31.26" in text and " 100.0 " in text
    told = rendered(pd.DataFrame([{f"{name} (in-domain)": 30.256, f"{name} perplexity, before": 31.256}]), "md")
    assert "30.26" in told and "31.26" in told


def test_models_of_different_tokenizers_stand_in_one_table():
    """Their protocols differ; each model is compared with itself."""
    other = run_of("b", 9.0, context=99)
    other.config["model"] = {"id": "meta-llama/Meta-Llama-3-8B"}
    assert len(perplexity_table([run_of("a", 8.0), other])) == 4
    with pytest.raises(InputError, match="two protocols"):
        perplexity_table([run_of("a", 8.0), run_of("b", 9.0, context=99)])


@pytest.mark.parametrize(
    ("order", "after", "choices", "name"),
    [
        (["cluster"], "cluster", chosen(), "ClusComp-"),
        (["cluster", "block_finetune"], "block_finetune", chosen(), "ClusComp"),
        (["cluster", "block_finetune", "recover"], "recover", chosen(), "ClusComp+"),
        (["cluster", "block_finetune", "recover"], "block_finetune", chosen(), "ClusComp"),
        (["cluster", "block_finetune", "finetune"], "finetune", chosen(), "ClusComp + finetune"),
        (["finetune"], "finetune", {}, "original + finetune"),
        (["cluster", "recover"], "recover", chosen(), "ClusComp- + recover"),
        (["cluster"], "cluster", chosen("cluscomp_data_free"), "ClusComp- (data-free)"),
        (["cluster"], "cluster", chosen("cluscomp_paper", damping=0.5), "ClusComp- (paper, damping=0.5)"),
        (["cluster"], "cluster", chosen("ipq"), "iPQ"),
        (["cluster"], "cluster", chosen(share="input", descent=2), "ClusComp- (share=input, descent=2)"),
        (["cluster"], "cluster", chosen("gptvq", allocation="uniform"), "GPTVQ (allocation=uniform)"),
        (["cluster"], "cluster", chosen(floor=0.0), "ClusComp- (floor=0)"),
        (["cluster"], "cluster", chosen(vector_dim=4, codebook_size=65500), "ClusComp-"),
        (["cluster"], "cluster", chosen("rtn", _target_="mine.Zeros", group=16), "RTN (_target_=mine.Zeros)"),
        (["cluster"], "cluster", chosen("gptq", prefix="compressed"), "GPTQ (prefix=compressed)"),
        (["cluster"], "cluster", chosen("gptq", drift=0.3), "GPTQ (drift=0.3)"),
        (
            ["cluster"],
            "cluster",
            chosen("gptq") | {"cluster": {"yaml": "corrected", "differs": {}}},
            "GPTQ (cluster=corrected)",
        ),
        (
            ["cluster", "recover"],
            "recover",
            chosen("cluscomp_best", floor=0.2) | {"cluster": {"yaml": "by_loss", "differs": {"drift": 0.5}}},
            "ClusComp- (best, floor=0.2, drift=0.5, scope=block) + recover",
        ),
        (["cluster"], "cluster", chosen("slim") | {"beside": {"yaml": "slim", "differs": {}}}, "SLiM"),
        (
            ["cluster"],
            "cluster",
            chosen() | {"beside": {"yaml": "none", "differs": {"rank": 16}}},
            "ClusComp- (beside.rank=16)",
        ),
        (["cluster", "tune"], "tune", chosen("signs", power=2), "signs (power=2) + tune"),
        (["cluster"], "original", chosen(), "original"),
    ],
)
def test_methods_are_called_what_papers_call_them_and_by_what_differs_from_their_yaml(order, after, choices, name):
    made = replace(record(), choices=choices)
    made.config["order"] = order
    assert method_name(made, after) == name
    assert method_name(method_record("a", "gptq", 3.0, 1.0, 3.0), "tune") == "GPTQ + tune"


def test_a_formula_by_which_bits_are_shared_out_is_told():
    made = replace(record(), choices=chosen())
    made.config["order"] = ["cluster"]
    made.config["stages"]["cluster"]["allocation"] = {"scope": "model", "formula": "opq"}
    assert method_name(made, "cluster") == "ClusComp- (scope=opq)"


def test_every_yaml_of_a_method_has_a_name_that_no_other_has():
    files = (ROOT / "conf" / "method").glob("*.yaml")
    made = {path.stem: replace(record(), choices=chosen(path.stem)) for path in files}
    for one in made.values():
        one.config["order"] = ["cluster", "block_finetune"]
    names = {name: method_name(one, "block_finetune") for name, one in made.items()}
    assert len(set(names.values())) == len(names) and not set(names) & set(names.values())


@pytest.mark.parametrize(
    ("method", "learns", "name"),
    [
        ("autoround", "rounding", "AutoRound"), ("omniquant", "clipping", "OmniQuant"),
        ("rtn", "values", "RTN + block_finetune"), ("gptq", None, "GPTQ + block_finetune"),
        ("gptq", "rounding", "GPTQ + block_finetune (learns=rounding)"),
    ],
)  # fmt: skip
def test_what_block_finetune_learns_of_uniform_grids_has_the_name_of_its_paper(method, learns, name):
    made = run_of("a", 30.0, method=method)
    made.config["order"] = ["cluster", "block_finetune"]
    made.config["stages"]["block_finetune"] = {} if learns is None else {"learns": learns}
    assert method_name(made, "block_finetune") == name
    assert method_name(made, "cluster") == ("GPTQ" if method == "gptq" else "RTN")


@pytest.mark.parametrize(
    ("method", "name"),
    [("cluscomp", "ClusComp (codes=moving)"), ("gptvq", "GPTVQ + block_finetune (codes=moving)")],
)
def test_codes_that_move_in_block_finetune_are_told(method, name):
    made = run_of("a", 30.0, method=method)
    made.config["order"] = ["cluster", "block_finetune"]
    made.config["stages"]["block_finetune"] = {"codes": "moving"}
    assert method_name(made, "block_finetune") == name and "moving" not in method_name(made, "cluster")


def test_two_models_of_one_name_are_told_apart_by_their_weights():
    """Of three runs on folders called `final` two are of one model; an older record does not tell which it is of."""
    runs = [run_of(name, 30.0 + number, method=name) for number, name in enumerate(("gptq", "awq", "rtn", "hqq"))]
    for made, weights in zip(runs, ("a" * 16, "a" * 16, "b" * 16, None)):
        made.config["model"] = {"id": "final"}
        made.run.update({} if weights is None else {"weights": weights})
    named = perplexity_table(runs).query("method != 'original'").set_index("method")["model"]
    assert named.to_dict() == {
        "GPTQ": "final@aaaaaaaa",
        "AWQ": "final@aaaaaaaa",
        "RTN": "final@bbbbbbbb",
        "HQQ": "final",
    }
    assert set(perplexity_table(runs[:2])["model"]) == {"final"}


def test_the_pareto_front_tells_what_learned_from_the_data_it_is_scored_on():
    seen = {"cluster": {"text": "pydoc/calibration", "in_domain": True, "overlap": 0.0}}
    runs = [run_of("a", 30.0), run_of("b", 60.0, method="rtn")]
    runs[0] = replace(runs[0], scores=[replace(row, seen=seen) for row in runs[0].scores])
    table = pareto(runs)
    assert dict(zip(table["method"], table["in-domain"])) == {"ClusComp-": True, "RTN": False}
    titles = [axes.get_title() for axes in plots.pareto(table).axes]
    assert titles == ["Llama-2-7B, pydoc\n(in-domain of some)"] * 2


def test_the_zeroshot_table_is_in_percent():
    rows = [asked("original", "piqa", "acc", 0.7512), asked("cluster", "piqa", "acc", 0.5)]
    made = with_tasks(["piqa"], None, rows)
    made.config["order"] = ["cluster"]
    made.run["seconds"], made.machine["peak_ram"] = {"cluster": 1.0}, {"cluster": 1}
    assert list(zeroshot_table([made])["piqa (partial)"]) == [75.1, 50.0]


PRINTED = {
    "paper": "P", "table": "T", "model": "Llama-2-7B", "method": "GPTQ", "bits_published": "3 g128",
    "bits_stored": 3.148, "protocol": "gptq_2048", "dataset": "pydoc", "metric": "perplexity", "value": 30.0,
    "source": "S", "note": "",
}  # fmt: skip


def whole(name: str, value: float, stored: float, **changed) -> Record:
    fields = {"context": 2048, "stride": 2048, "dtype": "float32", "partial": False}
    made = run_of(name, value, stored, **changed)
    scores = [Score(**vars(one) | {"protocol": protocol(**fields)}) for one in made.scores]
    return replace(made, scores=scores)


def test_ours_stands_beside_the_published_number_of_the_same_method_and_size():
    printed = [
        Published(**PRINTED), Published(**PRINTED | {"bits_published": "2 g128", "bits_stored": 2.141, "value": 90.0}),
        Published(**PRINTED | {"method": "FP16", "bits_published": "16", "bits_stored": 16.0, "value": 20.1}),
        Published(**PRINTED | {"model": "Llama-2-13B"}), Published(**PRINTED | {"protocol": "aqlm_4096"}),
    ]  # fmt: skip
    table = comparison_table([whole("a", 33.0, 3.1, method="gptq"), whole("b", 25.0, 3.1)], printed)
    found = {(row["method"], row["stored bits"]): row for row in table.to_dict("records")}
    assert len(found) == 4  # neither another model nor another context
    assert found["FP16", 16.0]["ours"] == 20.0 and found["FP16", 16.0]["within 2%"] == "the same"
    assert found["GPTQ", 3.148]["difference"] == 3.0 and found["GPTQ", 3.148]["within 2%"] == "differs"
    assert pd.isna(found["GPTQ", 2.141]["ours"]) and found["GPTQ", 2.141]["published"] == 90.0
    assert found["ClusComp-", 3.1]["ours"] == 25.0 and pd.isna(found["ClusComp-", 3.1]["published"])
    assert found["ClusComp-", 3.1]["origin"] == "run here" and found["GPTQ", 3.148]["origin"] == "P, T"


@pytest.mark.parametrize("unlike", [{"context": 512}, {"partial": True}])
def test_scores_under_another_protocol_stand_beside_nothing(unlike):
    assert comparison_table([run_of("a", 33.0, 3.1, method="gptq", **unlike)], [Published(**PRINTED)]).empty


def test_the_pareto_front_by_hand():
    """b is dominated by a in bits; in bytes its file is the smallest. Equal points dominate neither each other."""
    runs = [
        run_of("a", 30.0, 3.0, method="gptq", file_size=90_000_000),
        run_of("b", 40.0, 3.0, method="rtn", file_size=80_000_000),
        run_of("c", 50.0, 2.0, method="awq", file_size=85_000_000),
        run_of("d", 30.0, 3.0, method="aqlm", file_size=90_000_000),
    ]
    found = pareto(runs).set_index("method")
    assert found["dominated by bits"].to_dict() == {"AWQ": False, "GPTQ": False, "AQLM": False, "RTN": True}
    assert found["dominated by bytes"].to_dict() == {"AWQ": True, "GPTQ": False, "AQLM": False, "RTN": False}


@pytest.mark.parametrize("worst", [1e9, math.inf])
def test_a_perplexity_beyond_all_use_stands_on_the_panels_edge_and_hides_no_other(worst):
    runs = [run_of("a", 30.0, method="gptq"), run_of("b", 200.0, method="awq"), run_of("c", worst, method="rtn")]
    figure = plots.pareto(pareto(runs))
    for axes in figure.axes:
        heights = {height for line in axes.lines for height in line.get_ydata()}
        assert heights == {30.0, 200.0, 300.0} and axes.get_ylim()[1] == 300.0
    assert "on the upper edge: beyond the scale" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert not plots.pareto(pareto(runs[:2])).legends


def test_sizes_that_hardly_differ_stand_together():
    """2.91 and 2.92 bits take less than a fifth of a panel, 2 and 3 all of it."""
    for sizes, widest in (((2.91, 2.92), 0.2), ((2.0, 3.0), 1.0)):
        runs = [run_of(f"a{bits}", 30.0, bits, method=method) for bits, method in zip(sizes, ("gptq", "rtn"))]
        low, high = plots.pareto(pareto(runs)).axes[0].get_xlim()
        assert 0.8 * widest < (sizes[1] - sizes[0]) / (high - low) <= widest


def test_the_six_best_methods_have_a_colour_and_a_name_at_the_end_of_their_line():
    """Best over all sizes: one that was run at half of them counts as the median elsewhere, at fewer it is last."""
    names = ["gptq", "awq", "rtn", "hqq", "aqlm", "squeezellm", "gptvq", "vptq"]
    runs = [
        run_of(f"{name} {bits}", 30.0 + 5 * number + 40 / bits, float(bits), method=name)
        for number, name in enumerate(names)
        for bits in (2, 3)
    ]
    table = pareto(runs)
    best = standing(table)
    assert best == ["GPTQ", "AWQ", "RTN", "HQQ", "AQLM", "SqueezeLLM", "GPTVQ", "VPTQ"]
    few = standing(pareto([*runs[:6], run_of("more", 29.0, 3.0, method="vptq")]))
    assert few == ["VPTQ", "GPTQ", "AWQ", "RTN"]  # at 2 bits as AWQ
    runs = [
        run_of(f"{name} {bits}", 40 / bits, bits, method=name) for name in ("rtn", "awq") for bits in (2.0, 3.0, 4.0)
    ]
    assert standing(pareto([*runs, run_of("single", 1.0, 3.0, method="vptq")])) == ["AWQ", "RTN", "VPTQ"]
    figure = plots.pareto(table)
    for axes in figure.axes:
        told = {text.get_text(): text.get_color() for text in axes.texts}
        assert set(told) == set(best[:6]) and len(set(told.values())) == 6
        lines = [line for line in axes.lines if len(line.get_xdata())]
        assert [line.get_color() for line in lines] == [plots.GREY] * 2 + [told[name] for name in reversed(best[:6])]
        heights = [text.xyann[1] for text in axes.texts]
        assert heights == sorted(heights) and min(b - a for a, b in zip(heights, heights[1:])) > 0.08
        assert heights[0] >= 0 and heights[-1] <= 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["others (see the table)"]


def test_of_many_runs_six_have_a_colour_in_the_figure_of_errors_by_layer():
    """The least errors at the size at which most were made; one at another size is grey however small its error."""
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    runs = [("2", name, error) for name, error in zip("HGFEDCBA", range(8, 0, -1))] + [("4", "A", 0.1), ("4", "Z", 0.2)]
    rows = [
        {"model": "m", "limit": limit, "method": name, "block": block, "layer": kind, "relative error": error / 10}
        for limit, name, error in runs for kind in kinds for block in range(20)
    ]  # fmt: skip
    figure = plots.layers(pd.DataFrame(rows))
    assert [axes.get_title() for axes in figure.axes] == kinds
    for axes in figure.axes:
        lines = [(line.get_color(), line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata())]
        assert [value for colour, value in lines if colour != plots.GREY] == [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
        assert sorted(value for colour, value in lines if colour == plots.GREY) == [0.01, 0.02, 0.7, 0.8]
        assert axes.get_ylim() == figure.axes[0].get_ylim()
        told = {text.get_text(): text.get_color() for text in axes.texts}
        last = axes in (figure.axes[3], figure.axes[4])  # of a row
        assert set(told) == ({f"2 bits: {name}" for name in "ABCDEF"} if last else set())
        assert not told or [colour for colour, _ in lines[-6:]] == [told[f"2 bits: {name}"] for name in "FEDCBA"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["grey: G, H, Z, those named at other sizes"]
    assert not plots.layers(pd.DataFrame(rows[:600])).legends  # six: all have a name


def test_a_line_is_of_rows_that_were_trained_on_as_many_tokens():
    runs = [run_of("a", 30.0, 3.0), *(run_of(f"b{value}", value, 2.0) for value in (35.0, 40.0, 50.0))]
    table = pareto(runs).assign(**{TRAINING: [8192.0, 65536.0, 8192.0, 8192.0]}, method=["A", "A", "B", "A"])
    told = {text.get_text() for text in plots.pareto(table).axes[0].texts}
    assert told == {"A (8,192 tokens)", "A (65,536 tokens)", "B"}


@pytest.mark.parametrize("bits", [16.0, 32.0])
def test_the_original_stands_with_its_own_bits(bits):
    table = pareto([run_of("a", 30.0)])
    before = table[["model", "data"]].assign(**{"value": 20.0, BITS: bits})
    figure = plots.pareto(table, originals=before)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"original, {bits:g} bits"]


def test_each_model_has_its_own_original_in_its_panel():
    first, second = run_of("a", 30.0), run_of("b", 400.0)
    second.config["model"] = {"id": "another/model"}
    second.scores[0] = replace(second.scores[0], value=300.0)
    figure, data = figures.figures([first, second])["pareto"]
    dashed = {
        axes.get_title().partition(",")[0]: [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        for axes in figure.axes[:4]
    }
    assert dashed == {"Llama-2-7B": [20.0], "model": [300.0]}
    assert sorted(data["value"].dropna()) == [20.0, 300.0]


def test_long_names_are_told_whole_where_there_are_few():
    names = ["ClusComp (allocation=uniform)", "ClusComp (allocation=uniform) + finetune (lora)"]
    table = pareto([run_of("a", 30.0, method="gptq"), run_of("b", 40.0, method="awq")]).assign(method=names)
    for axes in plots.pareto(table).axes:
        assert [" ".join(text.get_text().split()) for text in axes.texts] == names


def test_six_names_are_told_whole_where_the_panel_has_room():
    """A second line of one word and dots would be too long: in two lines that name would be cut to its first word."""
    names = ["ClusComp- (allocation=sensitivity, floor=0)", "GPTQ", "AWQ", "RTN", "HQQ", "ClusComp- (floor=0)"]
    runs = [run_of(name, 30.0 + number, method="gptq", seed=number) for number, name in enumerate(names)]
    for axes in plots.pareto(pareto(runs).assign(method=names)).axes:
        assert {" ".join(text.get_text().split()) for text in axes.texts} == set(names)


def test_differences_below_the_spread_of_seeds_are_told():
    runs = [run_of(f"a{seed}", 30.0 + 2 * seed, seed=seed, method="gptq") for seed in (0, 1)]
    runs += [run_of(f"b{seed}", 32.5, seed=seed, method="awq") for seed in (0, 1)]
    runs += [run_of(f"c{seed}", 34.0, seed=seed, method="rtn") for seed in (0, 1)]
    runs += [run_of("d", 35.0, method="hqq", bits=2.0), run_of("e", 36.0, method="aqlm", bits=2.0)]
    found = seed_spread(runs).set_index("method")
    assert found.loc["GPTQ", ["mean perplexity", "spread", "seeds"]].tolist() == [31.0, 2.0, 2]
    assert found["within the spread"].to_dict() == {
        "GPTQ": "best", "AWQ": "yes", "RTN": "no", "HQQ": "best", "AQLM": "?",
    }  # fmt: skip


@pytest.mark.parametrize("rows", [[asked("cluster", "piqa", "acc", 0.5)], [score("original", 20.0)]])
def test_seeds_of_runs_without_a_perplexity_of_their_own_leave_a_page(rows):
    runs = [replace(run_of(f"a{seed}", 30.0, seed=seed), scores=rows) for seed in (0, 1)]
    assert seed_spread(runs).empty and list(page.page("mine", runs, "md")) == ["tables.md"]


def layered(method: str, error: float, **told: float) -> Record:
    made = run_of(method, 30.0, method=method)
    names = [f"model.layers.{block}.mlp.{layer}" for block in (0, 1) for layer in ("up_proj", "down_proj")]
    made.stages["cluster"]["found"] |= {
        "relative_error_by_layer": {name: error * (1 + number) for number, name in enumerate(names)},
        "distribution_by_layer": dict.fromkeys(names, told) if told else {},
    }
    return made


def test_layers_by_hand():
    told = {"kurtosis": 4.0, "outliers": 0.5, "centroids": 16, "dead": 0.25, "rare": 0.0, "entropy": 3.0}
    runs = [layered("cluscomp", 0.01, **told), layered("rtn", 0.1)]
    assert layer_table(runs)["block"].tolist() == [0, 0, 1, 1] * 2
    codebooks = codebook_table(runs)
    assert codebooks["entropy of code bits"].tolist()[:2] == [0.75, 0.75] and codebooks["dead"].isna().sum() == 2
    weights = weight_table(runs).set_index("layer")
    assert weights.loc["down_proj", "error of ClusComp- at 3"] == 0.03
    assert weights.loc["down_proj", "error of RTN at 3"] == 0.3 and weights.loc["up_proj", "kurtosis"] == 4.0


def test_drift_by_hand():
    made = run_of("a", 30.0)
    made.config["order"] = ["cluster", "block_finetune"]
    blocks = [{"before": 2.0, "after": 1.0, "moved": 0.25}, {"before": 4.0, "after": 3.0}]
    made.stages["block_finetune"] = {"found": {"blocks": blocks}}
    table = drift_table([made, run_of("b", 30.0)])
    assert table["method"].tolist() == ["ClusComp"] * 2 and table["loss"].tolist() == [0.5, 0.75]
    assert table["moved"].tolist()[0] == 0.25 and table["moved"].isna().tolist() == [False, True]


def test_predictions_by_hand():
    made = run_of("a", 30.0)
    made.machine["predicted"] = {"seconds": {"cluster": 45.0}, "peak_ram": {"cluster": 2**31}}
    (row,) = prediction_table([made, run_of("b", 30.0)]).to_dict("records")
    assert row["seconds, ratio"] == 2.0 and row["GiB, ratio"] == 0.5


@pytest.mark.parametrize(
    ("settings", "learns"), [({"trainable": "lora"}, "lora"), ({}, "all")]
)  # finetune=full has none
def test_the_finetuning_table_by_hand(settings, learns):
    made = record("a", [score("cluster", 30.0), score("finetune", 25.0), asked("finetune", "arc", "acc", 0.5)])
    made.config.update(order=["cluster", "finetune"])
    made.config["stages"]["finetune"] = settings
    numbers = {"trained_parameters": 7, "deployed_bytes": 2_000_000, "held_out_before": 3.0, "held_out_after": 2.0}
    made.stages["finetune"] = {"found": numbers, "size": size(3.0, 8.0, 1)}
    (row,) = finetuning_table([made, record("b")]).to_dict("records")
    assert row["learns"] == learns and row["numbers trained"] == 7 and row["MB to deploy"] == 2.0
    assert row["pydoc perplexity, before"] == 30.0 and row["pydoc perplexity, after"] == 25.0
    assert pd.isna(row["arc acc, %, before"]) and row["arc acc, %, after"] == 50.0


# rendering

TABLE = pd.DataFrame(
    {"limit": ["-", "3", "3", "2"], "method": ["original", "a_b", "100% & <c>", "d"], "ppl": [1.0, 3.0, 2.5, 1e6]}
)


@pytest.mark.parametrize(
    ("format_", "best", "plain"),
    [
        ("md", "**2.50**", "a_b"),
        ("latex", r"\bfseries 2.50", r"a\_b"),
        ("html", "#T_table_row2_col2 {\n  font-weight: bold", "100% &amp; &lt;c&gt;"),
    ],
)
def test_the_best_is_bold_and_the_original_takes_no_part(format_, best, plain):
    text = rendered(TABLE, format_, within=["limit"], scores=["ppl"])
    assert best in text and plain in text and "1.0e+06" in text
    assert text.count("**") + text.count("bfseries") * 2 + text.count("font-weight: bold") * 2 == 2
    highest = rendered(TABLE, format_, within=["limit"], scores=["ppl"], highest=True)
    assert best not in highest


def test_tables_of_one_page_do_not_style_each_other():
    first, second = (rendered(TABLE, "html", title=title, scores=["ppl"]) for title in ("one: a", "two: b"))
    names = [set(re.findall(r"#(T_[\w-]+?)(?:_row|_level|[ ,{])", text)) for text in (first, second)]
    assert names[0] and names[1] and not names[0] & names[1]


def test_latex_is_booktabs():
    text = rendered(TABLE, "latex", title="50% of_it")
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule")) and r"50\% of\_it" in text
    assert r"100\% \& \textless{}c\textgreater{}" in text
    fitted = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"  # within the text's width
    assert text.index(fitted) < text.index(r"\begin{tabular}") and text.count(r"\end{tabular}}") == 1


def test_csv_is_read_again_with_all_digits(tmp_path):
    (tmp_path / "a.csv").write_text(rendered(TABLE.assign(ppl=TABLE["ppl"] / 3), "csv"))
    assert pd.read_csv(tmp_path / "a.csv")["ppl"].tolist() == (TABLE["ppl"] / 3).tolist()


# commands


@pytest.fixture
def results(tmp_path):
    for name, value in (("a", 30.0), ("b", 60.0)):
        write(run_of(name, value, method={"a": "gptq", "b": "rtn"}[name]), tmp_path / "mine" / f"{name}.json")
    return tmp_path


def test_the_commands_write_tables_and_figures(results, capsys):
    for format_ in ("md", "latex", "html", "csv"):
        records.table(["mine", f"results={results}", f"format={format_}"])
    records.plot(["mine", f"results={results}"])
    written = capsys.readouterr().out.split()
    names = ("tables.md", "tables.tex", "tables.html", "pareto.csv", "pareto.pdf")
    assert all(str(results / "mine" / name) in written for name in names)
    assert all(Path(path).stat().st_size > 0 for path in written)
    assert not list((results / "mine").glob(".*"))  # nothing half-written


def test_a_text_on_which_the_original_alone_was_scored_ranks_no_method():
    seen = {"cluster": {"text": "pydoc", "in_domain": True, "overlap": 0.0}}
    runs = [
        run_of(f"{name}{bits}", 30.0 + bits, method=name, bits=bits)
        for name in ("rtn", "gptq", "awq")
        for bits in (3, 4)
    ]
    runs = [replace(one, scores=[one.scores[0], replace(one.scores[1], seen=seen)]) for one in runs]
    runs[0].scores.append(score("original", 25.0, dataset="c4"))
    found = overview_table(runs).set_index("method")
    assert found["3 bits: pydoc (in-domain)"].to_dict() == {"original": 20.0, "RTN": 33.0, "GPTQ": 33.0, "AWQ": 33.0}


def test_all_limits_at_a_glance_by_hand():
    runs = [run_of("a", 30.0, method="gptq"), run_of("b", 40.0, 2.0, method="gptq"), run_of("c", 35.0, method="rtn")]
    runs[1].config["stages"]["cluster"]["method"]["bits"] = 2.0
    assert overview_table(runs).empty  # two methods alone
    runs += [run_of(f"d{seed}", 20.0 + 4 * seed, method="awq", seed=seed) for seed in (0, 1)]
    found = overview_table(runs).set_index("method")
    assert found.index.tolist() == ["original", "AWQ", "GPTQ", "RTN"]  # best first at 3 bits, where all are
    assert found["3 bits: pydoc"].tolist() == [20.0, 22.0, 30.0, 35.0]
    assert found["2 bits: pydoc"].dropna().to_dict() == {"original": 20.0, "GPTQ": 40.0}


def test_at_a_glance_variants_that_another_beats_everywhere_are_left_out():
    """Of ClusComp's three one is beaten at both limits by another; one at one limit alone, which stays."""
    values = {"cluscomp_best": (30.0, 40.0), "cluscomp_paths": (31.0, 50.0), "cluscomp": (29.0, 45.0)}
    runs = [
        run_of(f"{method} {bits}", value, float(bits), method=method, bits=float(bits))
        for method, both in (values | {"gptq": (60.0, 70.0)}).items()
        for bits, value in zip((3, 2), both)
    ]
    whole, short = overview_table(runs), summary_table(runs)
    left_out = set(whole["method"]) - set(short["method"])
    assert len(whole) == 5 and len(short) == 4
    assert len(left_out) == 1 and left_out.pop().startswith("ClusComp- (paths")


def test_a_document_gets_the_table_it_names(results, tmp_path):
    paper = tmp_path / "paper.md"
    paper.write_text(
        "<!-- cluscomp table mine pareto -->\nold\n<!-- end -->\n<!-- cluscomp table mine -->\n<!-- end -->\n"
    )
    records.table(["mine", f"results={results}", f"into={paper}"])
    first, second = paper.read_text().split("<!-- end -->\n")[:2]
    assert "dominated by bits" in first and "old" not in first and "minutes" in second
    paper.write_text("<!-- cluscomp table mine nosuch -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="mine has no table 'nosuch'; it has perplexity, "):
        records.table(["mine", f"results={results}", f"into={paper}"])


def test_a_document_gets_the_first_table(results, tmp_path):
    paper = tmp_path / "paper.md"
    paper.write_text("Before\n<!-- cluscomp table mine -->\nold\n<!-- end -->\nafter\n")
    records.table(["mine", f"results={results}", f"into={paper}"])
    text = paper.read_text()
    assert text.startswith("Before\n<!-- cluscomp table mine -->\n| model") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and "**30.00**" in text
    paper.write_text("nothing")
    with pytest.raises(InputError, match="no place for the table"):
        records.table(["mine", f"results={results}", f"into={paper}"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "cluscomp table NAME"),
        (["none"], r"no records in .*none; there are some of: mine"),
        (["mine", "format=pdf"], "format=pdf: allowed here: md, latex, html, csv"),
        (["mine", "published=yes"], "published=yes: true or false"),
        (["mine", "colour=red"], "cluscomp table NAME"),
    ],
)
def test_a_wrong_argument_is_told(results, arguments, named):
    with pytest.raises(InputError, match=named):
        records.table([*arguments, *([f"results={results}"] if arguments else [])])


# what stands in the repository


def test_every_experiment_with_records_has_its_tables():
    assert sorted({path.parent.name for path in (ROOT / "results").glob("*/tables.md")}) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_and_figures_are_those_of_the_records(name):
    """`cluscomp table NAME` and `cluscomp plot NAME` would change nothing (make tables does both for all)."""
    assert page_of(name) == (ROOT / "results" / name / "tables.md").read_text()
    for stem, (_, data) in figures.figures(read_results(name)).items():
        assert plots.data_key(data) in (ROOT / "results" / name / f"{stem}.png").read_bytes().decode("latin-1")


def test_the_readme_shows_tables_of_records():
    text = (ROOT / "README.md").read_text()
    blocks = BLOCKS.findall(text)
    assert blocks
    for name, block in blocks:
        assert block in (ROOT / "results" / name / "tables.md").read_text()
        assert f"results/{name}/pareto.png" in text


def test_every_number_in_a_table_of_the_readme_is_one_of_a_record():
    """Tables of numbers stand in results/NAME/tables.md, or are what a run prints: those of the demo.

    What `cluscomp status` prints is no result.
    """
    from cluscomp.report.tables import stage_table

    known = "".join((ROOT / "results" / name / "tables.md").read_text() for name in EXPERIMENTS)
    known += stage_table(read_folder(ROOT / "results" / "demo")).to_string()
    numbers = set(re.findall(r"\d+(?:\.\d+)?", known))
    text = re.sub(r"\$ cluscomp status .*?\n\n", "", (ROOT / "README.md").read_text(), flags=re.S)
    text = re.sub(r"\]\(.*?\)|`[^`\n]*`", "", text)  # addresses of papers and commands are no results, either
    rows = [line for line in text.splitlines() if line.strip().startswith("|")]
    told = {number for row in rows for number in re.findall(r"\d+(?:\.\d+)?", row)}
    assert len(told) > 20 and told <= numbers | {"0.1"}  # the share of words seen is told in a mark


HOSTILE = (
    "a|b\n| x | y |\r\x1b[31m\u202e**bold** <script>alert(1)</script> [l](javascript:x) `c` $\\frac$ ~~s~~ _e_ &amp;"
)


def test_names_of_others_are_text_in_every_format_and_in_figures(tmp_path):
    """A record's model, data set, run and method may be called anything."""
    runs = [run_of("a", 60.0, method=HOSTILE), run_of("b", 30.0, method="=cmd|' /C calc'!A0"), run_of("c", 20.0)]
    for one in runs:
        one.config["model"] = {"id": HOSTILE}
        one.scores[:] = [replace(one_score, dataset=f"@{HOSTILE}") for one_score in one.scores]
        one.run["name"] = HOSTILE
    for view, table in page.views(runs):
        lines = rendered(table, "md").splitlines()
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(lines) == len(table) + 2 and len(bars) == 1, view.name
        shown = "\n".join(lines)
        assert "<script" not in shown and r"\|" in shown and r"\*\*bold\*\*" in shown and r"\[l\](" in shown
        sheet = list(csv.reader(rendered(table, "csv").splitlines()))
        assert len(sheet) == len(table) + 1 and {len(row) for row in sheet} == {len(table.columns)}
        assert not [cell for row in sheet for cell in row if re.match(r"[=+@-].", cell) and not is_number(cell)]
        texts = [rendered(table, "html", title=view.name), rendered(table, "latex"), for_terminal(table), shown]
        for text in (*texts, rendered(table, "csv")):
            assert not re.search(r"[\x1b\r\u202e]", text)
        assert len(texts[2].splitlines()) == len(lines)
    for stem, (figure, data) in figures.figures(runs).items():  # a lone $ or \frac would be mathematics
        assert plots.save(figure, tmp_path / stem, data)


def is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def test_a_recipe_of_random_starts_stands_with_three_seeds_or_not_at_all():
    """Others may stand with one."""
    found = read_results("methods")
    paper = next(one for one in found if (one.choices.get("method") or {}).get("yaml") == "cluscomp_paper")
    name = method_name(paper, "cluster")
    kept, left_out = page.of_enough_seeds([one for one in found if method_name(one, "cluster") != name] + [paper])
    assert paper not in kept and any(one.startswith(f"{name} at ") for one in left_out)
    three = [replace(paper, config=paper.config | {"seed": seed}) for seed in range(3)]
    with pytest.raises(InputError, match=f"nothing is left for a table.*{re.escape(name)} at.*seed=0,1,2"):
        page.page("one", [paper], "md")
    assert "pareto" not in figures.figures([paper])
    kept, left_out = page.of_enough_seeds(three)
    assert kept == three and not left_out
    text = page_of("methods")
    assert f"| {name} " not in text and f"Left out, for K-means from random points needs 3 seeds: {name}" in text


def test_a_table_for_a_narrow_terminal_folds_its_columns():
    row = {
        "after": "block_finetune", "bits per weight, linears": "2.998", "bits per weight, model": "5.738",
        "weights, MB": "96.6", "data": "pydoc (in-domain, 0.1% seen)", "perplexity": "18.22",
        "of the original's": "1.15x",
    }  # fmt: skip
    table = pd.DataFrame([row, row])
    whole, narrow = for_terminal(table), for_terminal(table, 80)
    assert max(map(len, whole.splitlines())) > 120 and for_terminal(table, 200) == whole
    assert max(map(len, narrow.splitlines())) <= 80
    assert all(word in narrow for text in [*row, *row.values()] for word in re.findall(r"[\w.%']+", text))


@pytest.mark.parametrize(
    "ends", [(5.6, 6.9), (640, 812), (22, 30), (9.5, 11), (30, 200), (9, 95), (0.02, 0.3), (3, 900), (8, 2e4), (1, 1e5)]
)
def test_a_logarithmic_axis_has_numbers_on_every_range(ends):
    figure = plots.Picture()
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.set_ylim(*ends)
    plots._logarithmic(axes.yaxis, ends)
    figure.canvas.draw()
    labels = [
        label.get_text() for label in axes.get_yticklabels(which="both")
        if label.get_text() and ends[0] <= label.get_position()[1] <= ends[1]
    ]  # fmt: skip
    assert 3 <= len(labels) <= 12 and len({*labels}) == len(labels)
    assert [float(label) for label in labels] == sorted(float(label) for label in labels)
