"""Which method wins at which size: the Pareto front, and what seeds say of differences."""

import math
from typing import Any

import pandas as pd

from cluscomp.report.differing import apart
from cluscomp.report.learned import TRAINING, check_texts, where_told
from cluscomp.report.names import by_model
from cluscomp.report.tables import IN_DOMAIN, IN_MEMORY, PERPLEXITY, STORED, check_protocols, scores, where_it_differs
from cluscomp.store.records import ORIGINAL, Record

BITS, BYTES, MEAN = STORED, "MB", f"mean {PERPLEXITY}"
SOME = 0.5  # of the sizes; a method that was run at fewer is no line to look at first


def pareto(records: list[Record]) -> pd.DataFrame:
    """One row for each model, data set, run and stage but the original: size, score, and what dominates it.

    `dominated by bits` tells whether another row of the same model and data is no larger and no worse, and better in
    one of both; `dominated by bytes` the same of the whole file. `in-domain`: the method learned from that data set.
    Raises InputError if scores of one model and data set were measured under different protocols, and for models that
    learned from unlike texts.
    """
    rows = _ranked(records)
    table = pd.DataFrame(
        {
            "model": rows["model"],
            "data": rows["dataset"],
            "method": rows["method"],
            TRAINING: rows[TRAINING],
            BITS: rows["linear_bits_per_weight"].round(3),
            IN_MEMORY: rows[IN_MEMORY].round(3),
            BYTES: (rows["checkpoint_bytes"] / 1e6).round(1),
            PERPLEXITY: rows["value"],
            IN_DOMAIN: rows["in_domain"],
        }
    ).drop_duplicates(ignore_index=True)
    for size, name in ((BITS, "dominated by bits"), (BYTES, "dominated by bytes")):
        table[name] = [_dominated(table, row, size) for _, row in table.iterrows()]
    table = table.sort_values(["model", "data", BITS, PERPLEXITY], ignore_index=True)
    return where_told(where_it_differs(table, table[BITS], table[IN_MEMORY]))


def _ranked(records: list[Record]) -> pd.DataFrame:
    """Perplexities of all but the originals, which can be ranked. Raises InputError where they cannot."""
    for same in by_model(records).values():
        check_protocols(same, PERPLEXITY)
    check_texts(records)
    rows = scores(records)
    return rows[(rows["metric"] == PERPLEXITY) & (rows["after"] != ORIGINAL)]


def standing(table: pd.DataFrame) -> list[str]:
    """The methods of `pareto`, best first: by how far, on the average of sizes, they are off the best of each size.

    Sizes are rounded to whole bits; the distance is that of perplexities' logarithms. Where a method was not run it
    stands as the median of those that were; those that were run at less than half of the sizes come last. Data sets
    that methods learned from take no part, unless there is no other.
    """
    sets = table.groupby(["model", "data"])[IN_DOMAIN].transform("any")
    table = table if sets.all() else table[~sets]
    value = table[PERPLEXITY].clip(upper=1e30).map(math.log)
    sizes = table.assign(size=table[BITS].round(), value=value).groupby(["model", "data", "size"])
    off = (sizes["value"].transform(lambda one: one - one.min())).groupby(
        [table["model"], table["data"], table[BITS].round(), table["method"]]
    )
    wide = off.mean().unstack()
    mean, few = wide.apply(lambda row: row.fillna(row.median()), axis=1).mean(), wide.notna().mean() < SOME
    return sorted(mean.index, key=lambda name: (few[name], mean[name], name.casefold()))


def _dominated(table: pd.DataFrame, row: pd.Series, size: str) -> bool:
    rivals = table[(table["model"] == row["model"]) & (table["data"] == row["data"])]
    losses, loss = rivals[PERPLEXITY], row[PERPLEXITY]
    no_worse = (rivals[size] <= row[size]) & (losses <= loss)
    return bool((no_worse & ((rivals[size] < row[size]) | (losses < loss))).any())


def seed_spread(records: list[Record]) -> pd.DataFrame:
    """One row for each model, data set, limit and method: mean over seeds, spread, distance to the best.

    The spread is the largest value less the smallest, NaN of one seed. `within the spread` is "yes" where the distance
    of the mean to the best one of the same limit is no more than the larger spread of both: it says nothing then.
    Methods that were trained on unlike numbers of tokens are no rivals. Empty where nothing but an original was
    scored. Raises InputError as `pareto`.
    """
    rows = _ranked(records)
    kind = ["model", "dataset", "limit", "method", TRAINING]
    rows = rows.assign(method=apart(rows, kind))
    found: list[dict[str, Any]] = []
    for key, group in rows.groupby(kind, sort=False, dropna=False):
        values = group.groupby("seed")["value"].mean()  # runs that share a stage tell of the same model
        spread = float(values.max() - values.min()) if len(values) > 1 else math.nan
        found.append(
            dict(zip(("model", "data", "limit", "method", TRAINING), key))
            | {"seeds": len(values)}
            | {MEAN: float(values.mean()), "spread": spread}
        )
    table = pd.DataFrame(found)
    if table.empty:
        return table
    kinds = table[["model", "data", "limit", TRAINING]].fillna("-")
    distances, within = [], []
    for number in range(len(table)):
        row, rivals = table.iloc[number], table[(kinds == kinds.iloc[number]).all(axis=1)]
        best = rivals.iloc[int(rivals[MEAN].argmin())]
        distance = row[MEAN] - best[MEAN]
        spread = max(row["spread"], best["spread"])
        distances.append(distance)
        within.append("best" if distance == 0 else "?" if math.isnan(spread) else "yes" if distance <= spread else "no")
    table["from the best"], table["within the spread"] = distances, within
    return where_told(table).round(3)
