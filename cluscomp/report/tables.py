"""Records to tables; pure."""

import math
import re
from typing import Any

import pandas as pd

from cluscomp.errors import InputError
from cluscomp.report.differing import settings_apart, settings_that_differ
from cluscomp.report.learned import CALIBRATION, TRAINING, check_texts, in_domain, tokens, where_told
from cluscomp.report.names import limit, method_name, model_name, stages_until
from cluscomp.store.records import EXTERNAL, ORIGINAL, Record, Score, differences

PARTIAL, IN_DOMAIN, SEEN, LORA = "partial", "in-domain", "seen", "lora"
STORED, IN_MEMORY = "stored bits", "bits in memory"
# Bits a weight that stay decoded beside those stored, for records older than the figure: of our methods' classes
OURS, DECODED = "cluscomp.methods.", {"cluscomp.methods.water_sic.WaterSic": 8}
PERPLEXITY = "perplexity"  # the metric by which models are ranked, the lowest first
ACCURACY = re.compile(r"acc$|exact_match")
MARKS = {
    PARTIAL: "measured on the first windows or rows only (evaluate.limit, tasks.limit)",
    IN_DOMAIN: "scored on the data set the model learned from; another one beside it: +data@evaluate.texts.NAME=NAME",
    EXTERNAL: "made by another library; bits and bytes are counted from a GGUF file, of others those its maker states",
    LORA: "adapters count among the stored bits and beside the limit, which is for what they stand on",
    SEEN: "of the scored text, in sequences of 13 words, stands word for word in what the model learned from",
}
COLUMNS = {
    IN_MEMORY: "stored bits and those that stay decoded beside them in memory, once the weights were used",
    CALIBRATION: "those that the compression looked at",
    TRAINING: "those that stages after it trained on, each time they were seen",
}


def scores(records: list[Record]) -> pd.DataFrame:
    """All scores of some records, one a row, with the run's name, model, method, bits and the protocol's hash."""
    settings = settings_apart(records)
    return pd.DataFrame(
        [
            {
                "run": record.run["name"],
                "seed": record.config["seed"],
                "model": model,
                "limit": limit(record),
                "method": method_name(record, score.after),
                "settings": settings.get((record.run["name"], score.after), ""),
                "after": score.after,
                "metric": score.metric,
                "dataset": score.dataset,
                "value": score.value,
                "stderr": score.stderr,
                "n": score.n,
                "partial": score.protocol.get("partial", False),
                "in_domain": in_domain(record, score),
                "overlap": max((one.get("overlap", 0.0) for one in score.seen.values()), default=0.0),
                "protocol": score.protocol["hash"],
            }
            | sizes(record, score.after)
            | {IN_MEMORY: memory_bits(record, score.after)}
            | tokens(record, score.after)
            for record in records
            for model in [model_name(record, records)]  # which takes a look at all of them
            for score in record.scores
        ]
    )


def sizes(record: Record, after: str) -> dict[str, Any]:
    """Bits per weight of the linears and of the model, and bytes of the weights, of the model after a stage.

    Adapters (LoRA) stand beside linears, and count with these.
    """
    size = _size(record, after)
    found = {key: size[key] for key in ("linear_bits_per_weight", "model_bits_per_weight", "checkpoint_bytes")}
    return found | {"linear_bits_per_weight": size["linear_bits_per_weight"] + _adapters(size)}


def _size(record: Record, after: str) -> dict[str, Any]:
    found: dict[str, Any] = record.size["original"] if after == ORIGINAL else record.stages[after]["size"]
    return found


def _adapters(size: dict[str, Any]) -> float:
    """Bits of adapters for each weight below them."""
    ledger = size.get("ledger", {})
    below = sum(bits for part, bits in ledger.items() if part not in ("kept", "adapters"))
    return ledger.get("adapters", 0) * size["linear_bits_per_weight"] / below if below else 0.0


def memory_bits(record: Record, after: str) -> float:
    """Bits per weight of the linears with what stays decoded in memory, NaN where that is not known."""
    size = _size(record, after)
    method = str(record.config["stages"].get("cluster", {}).get("method", {}).get("class"))
    older = math.nan
    if "cluster" in stages_until(record, after) and method.startswith(OURS):
        older = size["linear_bits_per_weight"] + DECODED.get(method, 0)
    return float(size.get("linear_bits_in_memory", older)) + _adapters(size)


def where_it_differs(table: pd.DataFrame, stored: pd.Series, in_memory: pd.Series) -> pd.DataFrame:
    """A table without the column of bits in memory if no row keeps more there than what is stored."""
    return table if (in_memory > stored + 0.001).any() else table.drop(columns=IN_MEMORY)


def marked(name: str, partial: bool, in_domain: bool, overlap: float) -> str:
    """A data set's name with what has to be known of a score on it; `legend` tells what the words mean."""
    share = f"{overlap:.1%}"
    applies = {PARTIAL: partial, IN_DOMAIN: in_domain, f"{share} {SEEN}": share != "0.0%"}
    marks = [mark for mark, whether in applies.items() if whether]
    return f"{name} ({', '.join(marks)})" if marks else name


def legend(table: pd.DataFrame) -> list[str]:
    """A line for each mark that stands in a table, and for each column that has to be explained."""
    cells = " ".join([*map(str, table.columns), *map(str, table.to_numpy().ravel())])
    marks = [f"{mark}: {meaning}" for mark, meaning in MARKS.items() if re.search(rf"[(, ]{mark}[,)]", cells)]
    return marks + [f"{name}: {meaning}" for name, meaning in COLUMNS.items() if name in table.columns]


def stage_table(records: list[Record], *, by_protocol: bool = False) -> pd.DataFrame:
    """One row for each run, data set and stage: bits, bytes, score, and the score over the original's.

    Raises InputError if scores of one data set were measured under different protocols, and says what each has. With
    `by_protocol` such scores stand in one table, protocol after protocol, each named by its hash: compare within them.
    """
    if not records:
        raise InputError("no records to make a table of")
    rows = scores(records)
    rows = rows[rows["metric"] == PERPLEXITY]
    if by_protocol:
        rows = rows.sort_values(["dataset", "protocol"], kind="stable", ignore_index=True)
    else:
        check_protocols(records, PERPLEXITY)
    originals = rows[rows["after"] == ORIGINAL].set_index(["run", "dataset", "protocol"])["value"]
    ratios = [
        value / originals.get(tuple(key), float("nan"))
        for value, *key in zip(rows["value"], rows["run"], rows["dataset"], rows["protocol"])
    ]
    table = pd.DataFrame(
        {
            "run": rows["run"],
            "after": rows["after"],
            "bits per weight, linears": rows["linear_bits_per_weight"].map("{:.3f}".format),
            IN_MEMORY: rows[IN_MEMORY].map(lambda bits: "-" if math.isnan(bits) else f"{bits:.3f}"),
            "bits per weight, model": rows["model_bits_per_weight"].map("{:.3f}".format),
            "weights, MB": (rows["checkpoint_bytes"] / 1e6).map("{:.1f}".format),
            **({"protocol": rows["protocol"]} if by_protocol else {}),
            "data": [marked(*row) for row in zip(rows["dataset"], rows["partial"], rows["in_domain"], rows["overlap"])],
            PERPLEXITY: rows["value"].map("{:.2f}".format),
            "of the original's": [f"{ratio:.2f}x" if math.isfinite(ratio) else "-" for ratio in ratios],
        }
    )
    return where_it_differs(table, rows["linear_bits_per_weight"], rows[IN_MEMORY])


def task_table(records: list[Record]) -> pd.DataFrame:
    """One row for each run and stage, a column for each task that was named, and for their mean; empty without tasks.

    Of a task its accuracies are shown (acc, exact_match), of one without any all it has; of a group its own number.
    Raises InputError as `stage_table`.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        asked = [score for score in record.scores if "task_hash" in score.protocol and score.metric != "flipped"]
        tasks = record.config["evaluate"]["tasks"] if asked else {"names": [], "mean": None}
        named = {*tasks["names"], tasks["mean"]}
        if not {*tasks["names"]} <= {score.dataset for score in asked}:  # the name of a tag has no score
            named |= {score.dataset for score in asked}
        for score in asked:
            accuracies = {one.metric for one in asked if one.dataset == score.dataset and ACCURACY.match(one.metric)}
            if score.dataset in named and (score.metric in accuracies or not accuracies):
                check_protocols(records, score.metric, score.dataset)
                name = marked(f"{score.dataset} {score.metric}", score.protocol["partial"], in_domain=False, overlap=0)
                error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
                row = rows.setdefault((record.run["name"], score.after), {})
                row[name] = f"{score.value:.3f}{error}"
    return pd.DataFrame([{"run": run, "after": after} | row for (run, after), row in rows.items()]).fillna("-")


def cost_until(record: Record, after: str) -> dict[str, float]:
    """Minutes of all stages up to one, without evaluation, and the most memory of any; NaN of the original."""
    order = stages_until(record, after)
    peak = max((record.machine["peak_ram"][stage] for stage in order), default=math.nan)
    seconds = sum(record.run["seconds"][stage] for stage in order) if order else math.nan
    return {"minutes": round(seconds / 60, 1), "peak RAM, GiB": round(peak / 2**30, 2)}


def prediction_table(records: list[Record]) -> pd.DataFrame:
    """One row for each run and stage that was planned: seconds and peak memory, predicted and measured, and ratios.

    A ratio is measured over predicted. Without a record that holds a plan the table is empty.
    """
    return pd.DataFrame(
        [
            {
                "run": record.run["name"],
                "stage": stage,
                "seconds planned": plan["seconds"][stage],
                "seconds": record.run["seconds"][stage],
                "seconds, ratio": record.run["seconds"][stage] / plan["seconds"][stage],
                "GiB planned": plan["peak_ram"][stage] / 2**30,
                "GiB": record.machine["peak_ram"][stage] / 2**30,
                "GiB, ratio": record.machine["peak_ram"][stage] / plan["peak_ram"][stage],
            }
            for record in records
            if (plan := record.machine.get("predicted")) is not None
            for stage in record.run["seconds"]
            if plan["seconds"].get(stage) and plan["peak_ram"].get(stage)
        ]
    ).round(2)


def cost_table(records: list[Record]) -> pd.DataFrame:
    """One row for each run and stage: settings that differ, relative squared error of weights, seconds, peak memory.

    Seconds are those on the clock, and those of all cores together, which tell more where a machine was shared.
    """
    return pd.DataFrame(
        [
            {"run": record.run["name"]}
            | differing
            | {
                "stage": stage,
                "relative error": record.stages.get(stage, {}).get("found", {}).get("relative_error"),
                "seconds": round(seconds, 1),
                "CPU seconds": round(record.run.get("cpu_seconds", {}).get(stage, math.nan), 1),
                "peak RAM, GiB": round(record.machine["peak_ram"][stage] / 2**30, 2),
            }
            for record, differing in zip(records, settings_that_differ(records))
            for stage, seconds in record.run["seconds"].items()
        ]
    )


def method_table(records: list[Record]) -> pd.DataFrame:
    """Methods ranked by the score after the last stage: one row for each run and data set, best first at each limit.

    `limit` is the `bits` that was asked for ("by hand" without); bits are those stored, and those a paper would count.
    Minutes and memory are those of all stages together and of the worst. Raises InputError for scores of one data set
    under different protocols, and for models that learned from unlike texts.
    """
    check_protocols(records, PERPLEXITY)
    check_texts(records)
    rows = []
    for record in (one for one in records if one.config["order"]):
        last = record.config["order"][-1]
        size = record.stages[last]["size"]
        values = {(score.dataset, score.after): score.value for score in record.scores if score.metric == PERPLEXITY}
        for dataset in dict.fromkeys(dataset for dataset, after in values if after == last):
            value, original = values[dataset, last], values.get((dataset, ORIGINAL), math.nan)
            rows.append(
                {
                    "data": dataset,
                    "limit": limit(record),
                    "method": method_name(record, record.config["order"][0]),
                    "after": last,
                    TRAINING: tokens(record, last)[TRAINING],
                    STORED: round(sizes(record, last)["linear_bits_per_weight"], 3),
                    IN_MEMORY: round(memory_bits(record, last), 3),
                    "paper's bits": round(size.get("paper_bits_per_weight", math.nan), 3),
                    PERPLEXITY: round(value, 2),
                    "of the original's": round(value / original, 2),
                }
                | cost_until(record, last)
                | {"run": record.run["name"]}
            )
    order = ["data", "limit", PERPLEXITY]
    table = pd.DataFrame(rows).sort_values(order, ascending=[True, False, True], ignore_index=True)
    return where_told(where_it_differs(table, table[STORED], table[IN_MEMORY]))


def check_protocols(records: list[Record], metric: str, dataset: str | None = None) -> None:
    """Raise InputError, with what each has, if scores of one data set (of each, if null) do not share one protocol."""
    seen: dict[str, tuple[str, Score]] = {}
    for record in records:
        for score in record.scores:
            if score.metric != metric or dataset not in (None, score.dataset):
                continue
            run, first = seen.setdefault(score.dataset, (record.run["name"], score))
            if first.protocol["hash"] != score.protocol["hash"]:
                here, there = differences(score.protocol, first.protocol)
                raise InputError(
                    f"{metric} on {score.dataset} was measured under two protocols, so it cannot stand in one table: "
                    f"{record.run['name']} after {score.after} has {', '.join(here)}; "
                    f"{run} after {first.after} has {', '.join(there)}"
                )
