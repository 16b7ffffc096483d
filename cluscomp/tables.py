"""Records to tables; pure."""

import math
from typing import Any

import pandas as pd

from cluscomp.errors import InputError
from cluscomp.records import Record, Score, differences

ORIGINAL = "original"


def scores(records: list[Record]) -> pd.DataFrame:
    """All scores of some records, one a row, with the run's key, method bits and the protocol's hash."""
    return pd.DataFrame(
        [
            {
                "run": record.run["name"],
                "seed": record.config["seed"],
                "after": score.after,
                "metric": score.metric,
                "dataset": score.dataset,
                "value": score.value,
                "stderr": score.stderr,
                "n": score.n,
                "partial": score.protocol.get("partial", False),
                "protocol": score.protocol["hash"],
            }
            | sizes(record, score.after)
            for record in records
            for score in record.scores
        ]
    )


def sizes(record: Record, after: str) -> dict[str, Any]:
    """Bits per weight of the linears and of the model, and bytes of the weights, of the model after a stage."""
    size = record.size["original"] if after == ORIGINAL else record.stages[after]["size"]
    return {key: size[key] for key in ("linear_bits_per_weight", "model_bits_per_weight", "checkpoint_bytes")}


def stage_table(records: list[Record], metric: str = "perplexity", *, by_protocol: bool = False) -> pd.DataFrame:
    """One row for each run, data set and stage: bits, bytes, score, and the score over the original's.

    Raises InputError if scores of one data set were measured under different protocols, and says what each has. With
    `by_protocol` such scores stand in one table, protocol after protocol, each named by its hash: compare within them.
    """
    if not records:
        raise InputError("no records to make a table of")
    rows = scores(records)
    rows = rows[rows["metric"] == metric]
    if by_protocol:
        rows = rows.sort_values(["dataset", "protocol"], kind="stable", ignore_index=True)
    else:
        check_protocols(records, metric)
    originals = rows[rows["after"] == ORIGINAL].set_index(["run", "dataset", "protocol"])["value"]
    ratios = [
        value / originals.get(tuple(key), float("nan"))
        for value, *key in zip(rows["value"], rows["run"], rows["dataset"], rows["protocol"])
    ]
    shown = {"protocol": rows["protocol"]} if by_protocol else {}
    return pd.DataFrame(
        {
            "run": rows["run"],
            "after": rows["after"],
            "bits per weight, linears": rows["linear_bits_per_weight"].map("{:.3f}".format),
            "bits per weight, model": rows["model_bits_per_weight"].map("{:.3f}".format),
            "weights, MB": (rows["checkpoint_bytes"] / 1e6).map("{:.1f}".format),
            **shown,
            "data": rows["dataset"] + rows["partial"].map({True: " (partial)", False: ""}),
            metric: rows["value"].map("{:.2f}".format),
            "of the original's": [f"{ratio:.2f}x" if math.isfinite(ratio) else "-" for ratio in ratios],
        }
    )


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


def method_table(records: list[Record], metric: str = "perplexity") -> pd.DataFrame:
    """Methods ranked by the score after the last stage: one row for each run and data set, best first at each limit.

    `limit` is the `bits` that was asked for ("by hand" without); bits are those stored, and those a paper would count.
    Minutes and memory are those of all stages together and of the worst. Raises InputError for scores of one data set
    under different protocols.
    """
    check_protocols(records, metric)
    rows = []
    for record in records:
        last, stages = record.config["order"][-1], record.config["order"]
        size, method = record.stages[last]["size"], record.config["stages"]["cluster"]["method"]
        values = {(score.dataset, score.after): score.value for score in record.scores if score.metric == metric}
        for dataset in dict.fromkeys(dataset for dataset, after in values if after == last):
            value, original = values[dataset, last], values.get((dataset, ORIGINAL), math.nan)
            rows.append(
                {
                    "data": dataset,
                    "limit": "by hand" if method["bits"] is None else f"{method['bits']:g}",
                    "method": record.stages["cluster"]["found"].get("method", "cluscomp"),
                    "after": last,
                    "stored bits": round(size["linear_bits_per_weight"], 3),
                    "paper's bits": round(size["paper_bits_per_weight"], 3),
                    metric: round(value, 2),
                    "of the original's": round(value / original, 2),
                    "minutes": round(sum(record.run["seconds"][stage] for stage in stages) / 60, 1),
                    "peak RAM, GiB": round(max(record.machine["peak_ram"][stage] for stage in stages) / 2**30, 2),
                    "run": record.run["name"],
                }
            )
    return pd.DataFrame(rows).sort_values(["data", "limit", metric], ascending=[True, False, True], ignore_index=True)


def settings_that_differ(records: list[Record]) -> list[dict[str, Any]]:
    """For each record those settings of its stages that are not the same in all of them, by their dotted name."""
    flat = [
        _flat({stage: record.config["stages"][stage] for stage in record.config["order"]}, "") for record in records
    ]
    keys = dict.fromkeys(key for values in flat for key in values)
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    return [{key: values.get(key) for key in differing} for values in flat]


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def check_protocols(records: list[Record], metric: str) -> None:
    """Raise InputError, with what each has, if scores of one data set do not share one protocol."""
    seen: dict[str, tuple[str, Score]] = {}
    for record in records:
        for score in (score for score in record.scores if score.metric == metric):
            run, first = seen.setdefault(score.dataset, (record.run["name"], score))
            if first.protocol["hash"] != score.protocol["hash"]:
                here, there = differences(score.protocol, first.protocol)
                raise InputError(
                    f"{metric} on {score.dataset} was measured under two protocols, so it cannot stand in one table: "
                    f"{record.run['name']} after {score.after} has {', '.join(here)}; "
                    f"{run} after {first.after} has {', '.join(there)}"
                )
