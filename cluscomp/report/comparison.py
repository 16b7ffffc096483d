"""The paper's main tables: one row a method, beside what papers print."""

import math
import re
from typing import Any

import pandas as pd

from cluscomp.report.differing import apart, settings_apart
from cluscomp.report.learned import CALIBRATION, TRAINING, check_texts, in_domain, learned_from, tokens, where_told
from cluscomp.report.names import by_model, limit, method_name, model_name
from cluscomp.report.published import CONTEXTS, Published
from cluscomp.report.tables import (
    ACCURACY,
    IN_DOMAIN,
    IN_MEMORY,
    PERPLEXITY,
    STORED,
    check_protocols,
    cost_until,
    marked,
    memory_bits,
    sizes,
    where_it_differs,
)
from cluscomp.store.records import EXTERNAL, ORIGINAL, Record, Score

SUMMARY_ROWS = 8  # of the table at a glance, the original among them
NEAR = 0.06  # bits per weight within which two sizes are called the same
TOLERANCE = 0.02  # of the published number, within which ours is called the same
FIVE = "zeroshot5"
SHAPE = ["model", "limit", "method", CALIBRATION, TRAINING, STORED, IN_MEMORY, "MB"]
COST = ["minutes", "peak RAM, GiB"]
TELLING = ["seed", "settings", "learned from"]  # columns of a table where they tell rows apart
NO_SCORES = {*SHAPE, *COST, *TELLING}


def perplexity_table(records: list[Record]) -> pd.DataFrame:
    """One row for each model, limit of bits, method and seed, a column for each data set; NaN: not measured.

    A data set is marked where a row's model learned from its domain. `learned from` names the texts, of another
    library's model the domain, which may be unknown; beside it the tokens of calibration and training. Raises
    InputError if scores of one model and data set were measured under different protocols, and for models that learned
    from unlike texts.
    """
    rows = _Rows(records)
    scored = _of_metric(records, PERPLEXITY)
    known = {score.dataset for record, score in scored if in_domain(record, score)}
    for record, score in scored:
        partial = score.protocol.get("partial", False)
        rows.of(record, score.after)[marked(score.dataset, partial, score.dataset in known, overlap=0)] = score.value
    return rows.sorted()


def overview_table(records: list[Record]) -> pd.DataFrame:
    """`perplexity_table` at a glance: one row a method, a column for each data set and limit, the mean over seeds.

    Where runs of one method and limit have other settings, they are rows of their own, and these stand in brackets.
    The original first, then the best first, by the data set and limit that most methods have. Empty for fewer than
    three methods or two limits.
    """
    table = perplexity_table(records)
    if table.empty:
        return table
    wide = table.melt([name for name in table.columns if name not in score_columns(table)], var_name="data")
    wide = wide[wide["value"].notna()]
    originals = wide[wide["method"] == ORIGINAL].set_index(["model", "data"])["value"].to_dict()
    alike = [name for name in ("model", "method", CALIBRATION, TRAINING) if name in table.columns]
    wide = wide[wide["method"] != ORIGINAL]
    cell = [*alike, "data", "limit"]
    if "settings" in wide.columns:
        wide = wide.assign(method=apart(wide, cell))
    wide = wide.groupby(cell, sort=False, dropna=False)["value"].mean().reset_index()
    if wide["method"].nunique() < 3 or wide["limit"].nunique() < 2:
        return pd.DataFrame()
    kinds = sorted(dict.fromkeys(zip(wide["data"], wide["limit"])), key=lambda one: one[0])
    ranked = [one for one in kinds if one[0] in ranked_columns(table)] or kinds  # only the original has those
    most = max(ranked, key=lambda one: int(((wide["data"] == one[0]) & (wide["limit"] == one[1])).sum()))
    rows = []
    for key, group in wide.groupby(alike, sort=False, dropna=False):
        values = dict(zip(zip(group["data"], group["limit"]), group["value"]))
        rows.append(dict(zip(alike, key)) | {_named(*kind): values.get(kind, math.nan) for kind in kinds})
    found = pd.DataFrame(rows).sort_values(["model", _named(*most)], ignore_index=True)
    first = [
        {"model": model, "method": ORIGINAL}
        | {_named(*kind): originals.get((model, kind[0]), math.nan) for kind in kinds}
        for model in found["model"].unique()
    ]
    found = pd.concat([pd.DataFrame(first), found]).sort_values("model", kind="stable", ignore_index=True)
    found = found[[*alike, *(_named(*kind) for kind in kinds)]]
    return found if found["model"].nunique() > 1 else found.drop(columns="model")


def summary_table(records: list[Record]) -> pd.DataFrame:
    """The first rows of `overview_table`, on the texts by which methods are ranked. Empty where that is all of it.

    Of variants of one system that were trained on as many tokens, those that another one beats everywhere are left out.
    """
    table = overview_table(records)
    fair = ranked_columns(table)
    short = table.drop(columns=[name for name in score_columns(table) if name not in fair])
    short = short[[not _beaten(short, number, fair) for number in range(len(short))]].head(SUMMARY_ROWS)
    return pd.DataFrame() if short.shape == table.shape else short.reset_index(drop=True)


def _beaten(table: pd.DataFrame, number: int, columns: list[str]) -> bool:
    """Whether another variant of a row's system, with the same tokens, is better wherever the row has a perplexity."""
    kinds = table[[name for name in ("model", CALIBRATION, TRAINING) if name in table.columns]].fillna("-")
    kinds = kinds.assign(system=table["method"].str.partition(" (")[0])
    row = table.iloc[number][columns].dropna()
    rivals = table[(kinds == kinds.iloc[number]).all(axis=1)][row.index].fillna(math.inf)
    return bool((rivals < row).all(axis=1).any()) if len(row) else False


def _named(data: str, limit: str) -> str:
    return f"{limit} bits: {data}" if limit[0].isdigit() else f"{limit}: {data}"


def zeroshot_table(records: list[Record]) -> pd.DataFrame:
    """As `perplexity_table`, of accuracies in percent: a column for each task and for their mean.

    It is acc; what else counts right answers (exact_match, with lm-eval's filter) stands behind the task's name.
    """
    check_texts(records)
    rows = _Rows(records)
    for metric in dict.fromkeys(score.metric for record in records for score in record.scores if _accuracy(score)):
        for record, score in _of_metric(records, metric):
            if _accuracy(score):
                name = score.dataset if metric == "acc" else f"{score.dataset} {metric}"
                name = marked(name, score.protocol["partial"], in_domain=False, overlap=0)
                rows.of(record, score.after)[name] = round(100 * score.value, 1)
    return rows.sorted(highest=True)


def _accuracy(score: Score) -> bool:
    """Whether it is a share of right answers to a task."""
    return bool(ACCURACY.match(score.metric)) and "task_hash" in score.protocol


def comparison_table(records: list[Record], published: list[Published]) -> pd.DataFrame:
    """Ours beside the published number: model, data, method, bits; ours, published, difference, verdict, origin.

    Of each model and data set that stands in a record under a protocol papers use (a whole text at that context; the
    five zero-shot tasks) all published numbers of that protocol are shown. Ours stands beside one of the same method
    and, to 0.06 bits, the same stored bits; what is missing on either side is NaN. Accuracies are in percent.
    """
    ours = _comparable(records)
    rows: list[dict[str, Any]] = []
    matched: set[int] = set()
    for row in published:
        here = [(number, one) for number, one in enumerate(ours) if _same_measurement(one, row)]
        if row.value is None or not here:
            continue
        same = [(number, one) for number, one in here if _same_method(one, row)]
        number, nearest = min(same, key=lambda one: abs(one[1]["bits"] - (row.bits or 0)), default=(None, None))
        matched |= set() if number is None else {number}
        rows.append(
            {
                "model": row.model, "data": row.dataset, "method": row.method, "printed bits": row.bits_published,
                "stored bits": row.bits, "ours": math.nan if nearest is None else nearest["value"],
                "published": row.value, "origin": f"{row.paper}, {row.table}",
            }
        )  # fmt: skip
    for number, one in enumerate(ours):
        if number not in matched:
            rows.append(
                {key: one[key] for key in ("model", "data", "method")}
                | {"printed bits": "", "stored bits": one["bits"], "ours": one["value"], "published": math.nan}
                | {"origin": "run here"}
            )
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    difference = table["ours"] - table["published"]
    verdicts = [
        "-" if math.isnan(one) else "the same" if abs(one) <= TOLERANCE * value else "differs"
        for one, value in zip(difference, table["published"])
    ]
    table.insert(7, "difference", difference.round(2))
    table.insert(8, f"within {TOLERANCE:.0%}", verdicts)
    table["ours"] = table["ours"].round(2)
    return table.sort_values(
        ["model", "data", "stored bits", "method"], ascending=[True, True, False, True]
    ).reset_index(drop=True)


def finetuning_table(records: list[Record]) -> pd.DataFrame:
    """One row for each run with stage finetune: what learned, how much it is, and every score before and after.

    `held-out loss` is that of answers the run did not train on. NaN where nothing was measured. Accuracies in percent.
    """
    rows, same = [], by_model(records)
    for record in records:
        if "finetune" not in record.config["order"]:
            continue
        order, found = record.config["order"], record.stages["finetune"]["found"]
        before = order[order.index("finetune") - 1] if order[0] != "finetune" else ORIGINAL
        row: dict[str, Any] = {
            "model": model_name(record, records),
            "method": method_name(record, before),
            STORED: round(sizes(record, before)["linear_bits_per_weight"], 3),
            IN_MEMORY: round(memory_bits(record, before), 3),
            "learns": record.config["stages"]["finetune"].get("trainable", "all"),  # finetune=full has no choice
            "numbers trained": found["trained_parameters"],
            "MB to deploy": round(found["deployed_bytes"] / 1e6, 1) if "deployed_bytes" in found else math.nan,
            "held-out loss, before": round(found["held_out_before"], 3),
            "held-out loss, after": round(found["held_out_after"], 3),
        }
        scored: dict[tuple[str, str], float] = {}
        for score in record.scores:
            accuracy = _accuracy(score)
            if score.after in (before, "finetune") and (accuracy or score.metric == PERPLEXITY):
                check_protocols(same[row["model"]], score.metric, score.dataset)
                when = "after" if score.after == "finetune" else "before"
                unit = f"{score.metric}, %" if accuracy else score.metric
                scored[f"{score.dataset} {unit}", when] = round(100 * score.value if accuracy else score.value, 2)
        names = dict.fromkeys(name for name, _ in scored)
        row |= {f"{name}, {when}": scored.get((name, when), math.nan) for name in names for when in ("before", "after")}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if table.empty else where_it_differs(table, table[STORED], table[IN_MEMORY])


def _of_metric(records: list[Record], metric: str) -> list[tuple[Record, Score]]:
    """All scores of a metric.

    Raises InputError for one data set under two protocols for one model, and for models that learned from unlike texts.
    """
    for same in by_model(records).values():
        check_protocols(same, metric)
    check_texts(records)
    return [(record, score) for record in records for score in record.scores if score.metric == metric]


class _Rows:
    """Rows of models after a stage, to which scores are added, and the table of them."""

    def __init__(self, records: list[Record]) -> None:
        self._records, self._settings = records, settings_apart(records)
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(self, record: Record, after: str) -> dict[str, Any]:
        """The row of a model after a stage; of the original, and of what several runs left alike, there is one."""
        original, run = after == ORIGINAL, record.run["name"]
        made = "" if original else record.stages[after].get("checkpoint_hash", run)
        key = (model_name(record, self._records), made, after)
        size = sizes(record, after)
        if key not in self._rows:
            self._rows[key] = {
                "model": key[0],
                "limit": "-" if original else limit(record),
                "method": method_name(record, after),
                "seed": "" if original else str(record.config["seed"]),
                "settings": self._settings.get((run, after), ""),
                "learned from": learned_from(record, after) or ("unknown" if after == EXTERNAL else ""),
                **(dict.fromkeys((CALIBRATION, TRAINING), math.nan) if original else tokens(record, after)),
                STORED: round(size["linear_bits_per_weight"], 3),
                IN_MEMORY: round(memory_bits(record, after), 3),
                "MB": round(size["checkpoint_bytes"] / 1e6, 1),
            } | cost_until(record, after)
        return self._rows[key]

    def sorted(self, *, highest: bool = False) -> pd.DataFrame:
        """The original first, then from many bits to few, best first; without columns that tell nothing."""
        table = pd.DataFrame(list(self._rows.values()))
        if table.empty:
            return table
        scored, first = score_columns(table), ranked_columns(table)[0]
        order = table["limit"].map(
            lambda name: -math.inf if name == "-" else -float(name) if name[0].isdigit() else 0.0
        )
        table = table.assign(order=order, changed=table["method"] != ORIGINAL).sort_values(
            ["model", "order", "changed", first],
            ascending=[True, True, True, not highest], kind="stable", ignore_index=True,
        )  # fmt: skip
        seeds = table["seed"].nunique() > 2  # with the original's
        extra = [name for name in TELLING if (seeds if name == "seed" else table[name].any())]
        table = where_told(table[[*SHAPE[:3], *extra, *SHAPE[3:], *scored, *COST]])
        return where_it_differs(table, table[STORED], table[IN_MEMORY])


def score_columns(table: pd.DataFrame) -> list[str]:
    """The columns of `perplexity_table`, `overview_table` and `zeroshot_table` that hold scores."""
    return [name for name in table.columns if name not in NO_SCORES]


def ranked_columns(table: pd.DataFrame) -> list[str]:
    """Those of the scores by which methods are ranked: on texts that no row learned from, if there is one."""
    scored = score_columns(table)
    return [name for name in scored if IN_DOMAIN not in name.rpartition("(")[2]] or scored


def _comparable(records: list[Record]) -> list[dict[str, Any]]:
    """Scores under a protocol that papers use, with its name, the mean over seeds."""
    settings = settings_apart(records)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        for score in record.scores:
            percent = score.metric == "acc" and _plain(score)
            names = [FIVE] if percent else [name for name, context in CONTEXTS.items() if _whole(score, context)]
            if score.protocol.get("partial", False) or not names:
                continue
            original = score.after == ORIGINAL
            run = "" if original else record.run["name"]
            found[model_name(record, records), run, score.after, score.dataset] = {
                "model": model_name(record, records), "data": score.dataset,
                "method": method_name(record, score.after), "limit": "-" if original else limit(record),
                "settings": settings.get((run, score.after), ""), "protocol": names[0],
                "bits": sizes(record, score.after)["linear_bits_per_weight"],
                "value": score.value * (100 if percent else 1),
            }  # fmt: skip
    if not found:
        return []
    rows = pd.DataFrame(list(found.values()))
    kind = ["model", "data", "method", "limit", "settings", "protocol"]
    means = rows.groupby(kind, sort=False)[["bits", "value"]].mean().reset_index()
    return [{str(key): value for key, value in row.items()} for row in means.round({"bits": 3}).to_dict("records")]


def _plain(score: Score) -> bool:
    """Whether tasks were asked as papers do: without examples, without a chat template."""
    shots = score.protocol.get("task_shots")
    shots = shots if isinstance(shots, list) else [shots]
    return "task_hash" in score.protocol and not any(shots) and not score.protocol.get("chat_template")


def _whole(score: Score, context: int) -> bool:
    asked = (score.metric, score.protocol.get("context"), score.protocol.get("stride"))
    return asked == (PERPLEXITY, context, context)


def _same_measurement(one: dict[str, Any], row: Published) -> bool:
    return (one["model"], one["data"], one["protocol"]) == (row.model, row.dataset, row.protocol)


def _same_method(one: dict[str, Any], row: Published) -> bool:
    """Whether a published number is of our row's method (GPTVQ 2D is a GPTVQ) and as large as it."""
    if one["method"] == ORIGINAL:
        return row.method == "FP16"
    ours, theirs = re.sub(r" \([^)]*\)", "", one["method"]).upper(), row.method.upper()
    same = ours == theirs or ours == theirs.split()[0]
    return same and row.bits is not None and abs(row.bits - one["bits"]) <= NEAR
