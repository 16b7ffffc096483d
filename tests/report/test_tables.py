"""Tables from records made by hand: every number in them computed by hand, and mixed protocols refused."""

import math

import pytest

from cluscomp.errors import InputError
from cluscomp.report import page
from cluscomp.report.differing import settings_that_differ
from cluscomp.report.tables import (
    legend,
    memory_bits,
    method_table,
    scores,
    sizes,
    stage_table,
    task_table,
)
from cluscomp.store.records import SCHEMA, Record, Score, protocol


def score(after: str, value: float, *, dataset: str = "pydoc", context: int = 512, partial: bool = False) -> Score:
    return Score(
        after=after, metric="perplexity", dataset=dataset, value=value, stderr=0.5, n=511,
        protocol=protocol(context=context, dtype="float32", partial=partial),
    )  # fmt: skip


def size(linear: float, model: float, bytes_: int) -> dict:
    return {"linear_bits_per_weight": linear, "model_bits_per_weight": model, "checkpoint_bytes": bytes_, "ledger": {}}


def chosen(method: str = "cluscomp", **differs: object) -> dict:
    """Choices of a run by hand: the method's yaml, and the settings that differ from it."""
    stage = {key: differs.pop(key) for key in ("prefix", "drift") if key in differs}
    return {"method": {"yaml": method, "differs": differs}, "cluster": {"yaml": "default", "differs": stage}}


def record(name: str = "run-a", rows: list[Score] | None = None) -> Record:
    last = size(3.0, 8.0, 123_000_000)
    return Record(
        schema=SCHEMA,
        run={"name": name},
        config={
            "seed": 7,
            "model": {"id": "meta-llama/Llama-2-7b-hf"},
            "order": ["cluster", "tune"],
            "stages": {"cluster": {"method": {"bits": 3.0, "init": "kd", "weighting": "diagonal"}}},
        },
        choices=chosen(),
        scores=[score("original", 20.0), score("cluster", 30.0), score("tune", 25.0)] if rows is None else rows,
        size=last | {"original": size(16.0, 16.0, 269_060_000)},
        machine={},
        stages={"cluster": {"size": size(2.9994, 8.0, 124_550_000), "found": {}}, "tune": {"size": last}},
    )


def test_the_stage_table_by_hand():
    table = stage_table([record()])
    assert table.to_dict("list") == {
        "run": ["run-a"] * 3,
        "after": ["original", "cluster", "tune"],
        "bits per weight, linears": ["16.000", "2.999", "3.000"],
        "bits per weight, model": ["16.000", "8.000", "8.000"],
        "weights, MB": ["269.1", "124.5", "123.0"],
        "data": ["pydoc"] * 3,
        "perplexity": ["20.00", "30.00", "25.00"],
        "of the original's": ["1.00x", "1.50x", "1.25x"],
    }


def test_each_run_and_data_set_has_its_own_original():
    first = record("run-a", [score("original", 20.0), score("cluster", 30.0)])
    second = record(
        "run-b",
        [
            score("original", 10.0),
            score("cluster", 40.0),
            score("original", 5.0, dataset="c4", context=99),
            score("cluster", 5.5, dataset="c4", context=99),
        ],
    )
    table = stage_table([first, second])
    assert list(table["of the original's"]) == ["1.00x", "1.50x", "1.00x", "4.00x", "1.00x", "1.10x"]


def test_without_an_original_the_ratio_is_left_out():
    table = stage_table([record("run-a", [score("cluster", 30.0)])])
    assert not {"nanx", "1.00x"} & set(table["of the original's"])


def test_partial_scores_say_so():
    assert list(stage_table([record(rows=[score("original", 20.0, partial=True)])])["data"]) == ["pydoc (partial)"]


def seen(in_domain: bool, overlap: float) -> dict:
    return {"cluster": {"text": "some text", "in_domain": in_domain, "overlap": overlap}}


def test_scores_on_what_the_model_learned_from_say_so():
    """Each mark has its line; the original, which has learned from nothing here, has none."""
    rows = [
        score("original", 20.0),
        Score(**vars(score("cluster", 30.0)) | {"seen": seen(True, 0.0)}),
        Score(**vars(score("tune", 25.0)) | {"seen": seen(True, 0.0123) | {"tune": seen(False, 0.5)["cluster"]}}),
        score("original", 25.0, dataset="c4", partial=True),
    ]
    found = record(rows=rows)
    table = stage_table([found])
    assert list(table["data"]) == ["pydoc", "pydoc (in-domain)", "pydoc (in-domain, 50.0% seen)", "c4 (partial)"]
    assert [line.partition(":")[0] for line in legend(table)] == ["partial", "in-domain", "seen"]
    assert [line.partition(":")[0] for line in legend(table[:2])] == ["in-domain"] and legend(table[:1]) == []
    assert list(scores([found])["in_domain"]) == [False, True, True, False]
    assert list(scores([found])["overlap"]) == [0, 0, 0.5, 0]


def asked(
    after: str, task: str, metric: str, value: float, stderr: float | None = None, limit: int | None = 4
) -> Score:
    fields = protocol(task_hash="abc", limit=limit, partial=limit is not None)
    return Score(after=after, metric=metric, dataset=task, value=value, stderr=stderr, n=4, protocol=fields)


def with_tasks(names: list[str], mean: str | None, rows: list[Score], name: str = "run-a") -> Record:
    made = record(name, [score("original", 20.0), *rows])
    made.config["evaluate"] = {"tasks": {"names": names, "mean": mean}}
    return made


def test_the_task_table_by_hand():
    """Of piqa the accuracy, of the group its own number and none of its parts, of word perplexity all there is."""
    rows = [
        asked("original", "piqa", "acc", 0.75, 0.25), asked("original", "piqa", "acc_norm", 0.5, 0.25),
        asked("original", "mmlu_law", "acc", 0.125), asked("original", "mmlu", "acc", 0.25),
        asked("original", "wikitext", "word_perplexity", 30.0, limit=None),
        asked("original", "all", "acc", 0.5), asked("cluster", "piqa", "acc", 0.5),
        asked("cluster", "piqa", "flipped", 0.5),
    ]  # fmt: skip
    table = task_table([with_tasks(["piqa", "mmlu", "wikitext"], "all", rows)])
    assert table.to_dict("list") == {
        "run": ["run-a", "run-a"],
        "after": ["original", "cluster"],
        "piqa acc (partial)": ["0.750 ± 0.250", "0.500"],
        "mmlu acc (partial)": ["0.250", "-"],
        "wikitext word_perplexity": ["30.000", "-"],
        "all acc (partial)": ["0.500", "-"],
    }
    assert [line.partition(":")[0] for line in legend(table)] == ["partial"]
    assert list(stage_table([with_tasks(["piqa"], None, rows)])["data"]) == ["pydoc"]  # perplexities alone


def test_the_tasks_of_a_tag_are_shown_each():
    rows = [asked("original", "arc_easy", "acc", 0.5), asked("original", "arc_challenge", "acc", 0.25)]
    table = task_table([with_tasks(["ai2_arc"], None, rows)])
    assert list(table.columns) == ["run", "after", "arc_easy acc (partial)", "arc_challenge acc (partial)"]
    assert len(task_table([record()])) == 0


def test_tasks_of_two_protocols_are_refused():
    first, second = (
        with_tasks(["piqa"], None, [asked("original", "piqa", "acc", 0.5, limit=limit)], f"run-{limit}")
        for limit in (4, 8)
    )
    with pytest.raises(InputError, match="acc on piqa was measured under two protocols"):
        task_table([first, second])


def test_scores_are_tidy():
    table = scores([record(), record("run-b")])
    assert len(table) == 6
    assert table["value"].tolist() == [20.0, 30.0, 25.0] * 2
    assert set(table["seed"]) == {7} and set(table["n"]) == {511} and set(table["stderr"]) == {0.5}
    assert table["checkpoint_bytes"].tolist()[:2] == [269_060_000, 124_550_000]


def test_sizes_after_each_stage():
    assert sizes(record(), "original")["linear_bits_per_weight"] == 16.0
    assert sizes(record(), "cluster")["checkpoint_bytes"] == 124_550_000


def stored_as(method: str, **figures: float) -> Record:
    """A run whose method is of the named class, with figures that the record holds of its size."""
    made = record()
    made.config["stages"]["cluster"]["method"]["class"] = method
    for stage in made.stages.values():
        stage["size"] = stage["size"] | figures
    return made


def test_bits_in_memory_stand_beside_those_of_the_file_where_they_differ():
    told = stored_as("mine.Method", linear_bits_in_memory=5.0)
    assert memory_bits(told, "cluster") == 5.0
    table = stage_table([told])
    assert list(table["bits in memory"]) == ["-", "5.000", "5.000"] and legend(table)[-1].startswith("bits in memory: ")
    alike = stage_table([stored_as("mine.Method", linear_bits_in_memory=3.0)])
    assert "bits in memory" not in alike and legend(alike) == []


def test_bits_in_memory_of_older_records_follow_from_what_a_method_stores_or_are_not_told():
    """WaterSIC's numbers are a byte each once decoded, all else of ours is as stored; of others nothing is known."""
    assert memory_bits(stored_as("cluscomp.methods.water_sic.WaterSic"), "tune") == 11.0
    assert memory_bits(stored_as("cluscomp.methods.gptq.Gptq"), "tune") == 3.0
    for unknown in (stored_as("mine.Method"), record()):
        assert math.isnan(memory_bits(unknown, "tune")) and math.isnan(memory_bits(unknown, "original"))


def test_mixed_protocols_are_refused_with_the_key_and_both_values():
    other = record("run-b", [score("original", 20.0, context=2048)])
    with pytest.raises(InputError) as caught:
        stage_table([record(), other])
    assert str(caught.value) == (
        "perplexity on pydoc was measured under two protocols, so it cannot stand in one table: "
        "run-b after original has context=2048; run-a after original has context=512"
    )


def test_mixed_protocols_stand_apart_where_that_is_asked_for():
    """Each ratio is to the original under the same protocol."""
    longer = [score("original", 10.0, context=2048), score("cluster", 40.0, context=2048)]
    table = stage_table([record(), record("run-b", longer)], by_protocol=True)
    ratio = dict(zip(zip(table["run"], table["after"]), table["of the original's"]))
    assert ratio["run-a", "cluster"] == "1.50x" and ratio["run-b", "cluster"] == "4.00x"
    names = list(table["protocol"])
    assert len(set(names)) == 2 and names == sorted(names)
    one_run = record("run-a", [score("original", 20.0), *longer])
    assert list(stage_table([one_run], by_protocol=True)["of the original's"]).count("4.00x") == 1


def test_an_altered_protocol_is_refused():
    fields = score("original", 20.0).protocol | {"context": 4096}
    with pytest.raises(ValueError, match="its hash is not that of its fields"):
        Score(**vars(score("original", 20.0)) | {"protocol": fields})


def test_other_metrics_may_have_other_protocols():
    accuracy = Score(**vars(score("original", 0.5, context=9)) | {"metric": "accuracy"})
    table = stage_table([record(), record("run-b", [accuracy])])
    assert list(table["run"]) == ["run-a"] * 3


def test_no_records_give_an_input_error_or_an_empty_table():
    try:
        assert len(stage_table([])) == 0
    except InputError as error:
        assert "record" in str(error)


def test_records_without_scores_make_no_page_and_say_so():
    with pytest.raises(InputError, match="mine: its records hold no score"):
        page.page("mine", [record("run-b", [])], "md")


def test_only_settings_of_stages_that_were_run_and_differ_are_shown():
    def with_config(**method):
        made = record()
        stages = {"cluster": {"method": {"bits": 3.0} | method}, "tune": {"lr": method["seed"]}}
        made.config.update(order=["cluster"], stages=stages)
        return made

    records = [with_config(init="kd", seed=1), with_config(init="random_points", seed=1, weighting="none")]
    assert settings_that_differ(records) == [
        {"cluster.method.init": "kd", "cluster.method.weighting": None},
        {"cluster.method.init": "random_points", "cluster.method.weighting": "none"},
    ]
    assert settings_that_differ(records, known=True) == [
        {"cluster.method.init": "kd"},
        {"cluster.method.init": "random_points"},
    ]
    assert settings_that_differ(records[:1]) == [{}]
    other = record()
    other.config.update(order=["tune"], stages={"tune": {"lr": 1}})  # nothing of cluster differs where it was run
    assert settings_that_differ([records[0], other]) == [{}, {}]


def method_record(name: str, method: str, bits: float | None, value: float, stored: float) -> Record:
    rows = [score("original", 20.0), score("cluster", value + 5), score("tune", value)]
    last = size(stored, 8.0, 1) | {"paper_bits_per_weight": 3.25}
    return Record(
        schema=SCHEMA,
        run={"name": name, "seconds": {"cluster": 90.0, "tune": 30.0, "evaluate tune": 999.0}},
        config={"order": ["cluster", "tune"], "stages": {"cluster": {"method": {"bits": bits}}}},
        choices=chosen(method),
        scores=rows,
        size={},
        machine={"peak_ram": {"cluster": 2**30, "tune": 2**29, "evaluate tune": 2**33}},
        stages={"cluster": {"size": {}, "found": {}}, "tune": {"size": last}},
    )


def test_methods_are_ranked_within_each_limit_by_hand():
    found = [
        method_record("a", "rtn", 3.0, 60.0, 2.997),
        method_record("b", "rtn", 4.0, 25.0, 3.99),
        method_record("c", "gptq", 3.0, 30.0, 2.997),
        method_record("d", "gptq", None, 22.0, 3.297),
    ]
    table = method_table(found)
    assert list(table["run"]) == ["d", "b", "c", "a"]
    assert list(table["limit"]) == ["by hand", "4", "3", "3"]
    assert table.iloc[2].to_dict() == {
        "data": "pydoc", "limit": "3", "method": "GPTQ", "after": "tune", "stored bits": 2.997, "paper's bits": 3.25,
        "perplexity": 30.0, "of the original's": 1.5, "minutes": 2.0, "peak RAM, GiB": 1.0, "run": "c",
    }  # fmt: skip
