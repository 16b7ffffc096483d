"""Runs of one method that differ in settings: each is named by them, and none is averaged with another."""

from dataclasses import replace

import pandas as pd
import pytest
from test_page import PRINTED, run_of, whole
from test_tables import asked, record, score, size

from cluscomp.report import page
from cluscomp.report.comparison import comparison_table, finetuning_table, overview_table, perplexity_table
from cluscomp.report.names import limit
from cluscomp.report.pareto import seed_spread
from cluscomp.report.published import Published
from cluscomp.report.tables import legend, memory_bits, sizes
from cluscomp.store.records import protocol


def under(one, **changed):
    """A score under another protocol."""
    fields = {key: value for key, value in one.protocol.items() if key != "hash"}
    return replace(one, protocol=protocol(**fields | changed))


def shaped(name: str, value: float, seed: int, **shape: int):
    """A run of the paper's recipe, its shape given by hand."""
    made = run_of(name, value, seed=seed, method="cluscomp_paper")
    made.config["stages"]["cluster"]["method"].update(bits=None, init="random_points", **shape)
    made.choices["method"]["differs"].update(bits=None, **shape)
    return made


def test_sizes_by_hand_are_groups_of_their_own():
    runs = [
        shaped(f"{length} {seed}", 10.0 * length + seed, seed, vector_dim=length, codebook_size=256)
        for length in (4, 6, 9)
        for seed in (0, 1, 2)
    ]
    found = seed_spread(runs).set_index("limit")
    assert found["seeds"].to_dict() == {f"vector_dim={length} codebook_size=256": 3 for length in (4, 6, 9)}
    assert found["mean perplexity"].tolist() == [41.0, 61.0, 91.0] and found["spread"].tolist() == [2.0] * 3
    kept, left_out = page.of_enough_seeds(runs[::3])  # three shapes of one seed each
    assert not kept and len(left_out) == 1
    assert limit(run_of("a", 1.0, bits=None)) == "by hand"


def test_the_mean_is_over_seeds_and_never_over_settings():
    runs = [run_of(f"a{seed}", 30.0 + seed, seed=seed, method="gptq") for seed in (0, 2)]
    runs += [run_of("b", 40.0, method="rtn"), run_of("c", 50.0, method="awq"), run_of("d", 90.0, method="awq", seed=1)]
    for made, samples in zip(runs, (1, 1, 7, 1, 2)):
        made.config["stages"]["cluster"] |= {"samples": samples, "data": {"calibration": made.run["name"]}}
    runs.append(run_of("e", 99.0, 2.0, method="rtn", bits=2.0))
    table = overview_table(runs).set_index("method")
    assert table["3 bits: pydoc"].tolist() == [20.0, 31.0, 40.0, 50.0, 90.0]
    two = ["AWQ [cluster.samples=1]", "AWQ [cluster.samples=2]"]
    assert table.index.tolist() == ["original", "GPTQ", "RTN", *two]
    spread = seed_spread(runs).set_index(["method", "limit"])
    assert spread.loc[("GPTQ", "3"), "seeds"] == 2 and [spread.loc[(name, "3"), "seeds"] for name in two] == [1, 1]
    found = perplexity_table(runs)
    assert found["settings"].tolist() == ["", "", "", "", "cluster.samples=1", "cluster.samples=2", ""]


def finetuned(name: str, model: str, tokenizer: str, before: float, after: float):
    """A finetuned run that answered GSM8K, which has a number for each of two filters."""
    rows = [score("cluster", 30.0), score("finetune", 25.0)]
    for stage, value in (("cluster", before), ("finetune", after)):
        rows += [asked(stage, "gsm8k", f"exact_match ({kind}-match)", value) for kind in ("strict", "flexible")]
    made = record(name, [under(one, tokenizer=tokenizer) for one in rows])
    made.config.update(order=["cluster", "finetune"], model={"id": model}, seed=0)
    made.config["stages"]["finetune"] = {"trainable": "codebooks"}
    numbers = {"trained_parameters": 7, "held_out_before": 3.0, "held_out_after": 2.0}
    made.stages["finetune"] = {"found": numbers, "size": size(3.0, 8.0, 1)}
    made.run["seconds"] = dict.fromkeys(("cluster", "finetune"), 9.0)
    made.machine["peak_ram"] = dict.fromkeys(("cluster", "finetune"), 1)
    return made


def test_answers_that_match_stand_in_the_tables_of_finetuning_of_several_models():
    runs = [finetuned("a", "meta-llama/Llama-2-7b-hf", "x", 0.25, 0.5), finetuned("b", "another/model", "y", 0.1, 0.2)]
    table = finetuning_table(runs)
    assert table["gsm8k exact_match (strict-match), %, before"].tolist() == [25.0, 10.0]
    assert table["gsm8k exact_match (flexible-match), %, after"].tolist() == [50.0, 20.0]
    text = page.page("mine", runs, "md")["tables.md"]
    assert "## Tasks, accuracy in percent" in text and "gsm8k exact_match (strict-match) (partial)" in text


def test_of_tasks_the_best_comes_first_and_the_original_before_all():
    runs = [run_of("a", 30.0, method="gptq"), run_of("b", 40.0, method="awq")]
    rows = [[asked("cluster", "piqa", "acc", value)] for value in (0.4, 0.5)]
    runs = [replace(one, scores=[asked("original", "piqa", "acc", 0.3), *more]) for one, more in zip(runs, rows)]
    (found,) = [table for view, table in page.views(runs) if view.name == "zeroshot"]
    assert found["method"].tolist() == ["original", "AWQ", "GPTQ"]


def printed(method: str, **changed):
    return Published(**PRINTED | {"method": method} | changed)


@pytest.mark.parametrize("settings", [{}, {"damping": 0.05}])
def test_a_stage_behind_the_brackets_makes_another_method(settings):
    made = whole("a", 33.0, 3.1, method="gptq")
    made.choices["method"]["differs"].update(settings)
    assert comparison_table([made], [printed("GPTQ")])["origin"].tolist() == ["run here", "P, T"]  # the original
    made.config["order"] = ["cluster", "recover"]
    made.stages["recover"] = made.stages["cluster"]
    made = replace(made, scores=[replace(one, after="recover") for one in made.scores if one.after == "cluster"])
    table = comparison_table([made], [printed("GPTQ")])
    assert sorted(table["origin"]) == ["P, T", "run here"] and sorted(table["ours"].isna()) == [False, True]


def test_the_mean_over_seeds_stands_beside_a_published_number():
    runs = [whole(f"a{seed}", 30.0 + seed, 3.1, method="gptq", seed=seed) for seed in (0, 1, 2)]
    table = comparison_table(runs, [printed("GPTQ")])
    assert table["ours"].tolist() == [20.0, 31.0] and table["published"].tolist()[1:] == [30.0]


@pytest.mark.parametrize(
    ("asked_so", "theirs"),
    [({}, True), ({"task_shots": 0}, True), ({"task_shots": [0, 0]}, True), ({"task_shots": 5}, False),
     ({"task_shots": [0, 5]}, False), ({"chat_template": True}, False)],
)  # fmt: skip
def test_tasks_with_examples_or_a_chat_are_no_zero_shot_tasks(asked_so, theirs):
    made = run_of("a", 33.0, 3.148, method="gptq")
    made = replace(made, scores=[under(asked("cluster", "zeroshot5", "acc", 0.5, limit=None), **asked_so)])
    number = printed("GPTQ", protocol="zeroshot5", dataset="zeroshot5", metric="acc, %", value=64.0)
    table = comparison_table([made], [number])
    assert table.get("ours", pd.Series()).tolist() == ([50.0] if theirs else [])


def test_adapters_count_among_the_stored_bits():
    """4 bits of each of 1000 weights, and beside them 500 of adapters."""
    made = finetuned("a", "another/model", "x", 0.25, 0.5)
    made.config["stages"]["finetune"] = {"trainable": "lora"}
    ledger = {"codes": 3500, "scales": 500, "kept": 9000, "adapters": 500}
    made.stages["finetune"]["size"] = size(4.0, 8.0, 1) | {"ledger": ledger, "linear_bits_in_memory": 12.0}
    assert sizes(made, "finetune")["linear_bits_per_weight"] == 4.5 and memory_bits(made, "finetune") == 12.5
    table = perplexity_table([made]).set_index("method")
    assert table.loc["ClusComp- + finetune (lora)", "stored bits"] == 4.5
    assert [line.partition(":")[0] for line in legend(perplexity_table([made]))][:1] == ["lora"]
