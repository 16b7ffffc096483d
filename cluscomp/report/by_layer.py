"""What records tell of single layers: error, kurtosis and outliers of weights, use of centroids."""

import math
import re
from typing import Any

import pandas as pd

from cluscomp.report.names import limit, method_name, model_name
from cluscomp.store.records import Record


def layer_table(records: list[Record]) -> pd.DataFrame:
    """One row for each run and compressed layer, NaN where a record is older than what is asked of it.

    `relative error` is squared error over squared size; `kurtosis` is 3 for a normal distribution; `outliers` is the
    share of entries beyond 6 standard deviations; `dead` and `rare` are shares of centroids (solve/distribution.py).
    """
    rows: list[dict[str, Any]] = []
    for record in records:
        found = record.stages.get("cluster", {}).get("found", {})
        known = found.get("distribution_by_layer", {})
        run = (model_name(record, records), limit(record), method_name(record, "cluster")) if found else ()
        for name, error in found.get("relative_error_by_layer", {}).items():
            number = re.search(r"\.(\d+)\.(.+)$", name)
            of_layer = known.get(name, {})
            rows.append(
                dict(zip(("model", "limit", "method"), run, strict=True))
                | {
                    "block": int(number[1]) if number else -1,
                    "layer": number[2].rpartition(".")[2] if number else name,
                    "relative error": error,
                }
                | {key: of_layer.get(key, math.nan) for key in ("kurtosis", "outliers")}
                | {key: of_layer.get(key, math.nan) for key in ("centroids", "dead", "rare", "entropy")}
            )
    return pd.DataFrame(rows)


def codebook_table(records: list[Record]) -> pd.DataFrame:
    """One row for each run and kind of layer, means over all blocks: how centroids are used, and the error left.

    `entropy of code bits` is the entropy of the codes over log2 of the number of centroids: 1 where all are used alike.
    """
    table = layer_table(records)
    if table.empty:
        return table
    table["entropy of code bits"] = table["entropy"] / table["centroids"].map(math.log2, na_action="ignore")
    kinds = table.groupby(["model", "limit", "method", "layer"], sort=False)
    means = kinds[["relative error", "centroids", "dead", "rare", "entropy", "entropy of code bits"]].mean()
    return means.round(4).reset_index()


def drift_table(records: list[Record]) -> pd.DataFrame:
    """One row for each run with stage block_finetune and block: how far it moved what is stored, and what that gave.

    `moved` is the squared change of codebooks (or grids, or dense weights where codes are rounded anew) over their
    squared size, NaN in older records; `loss` is the error of the block's outputs after over that before.
    """
    return pd.DataFrame(
        [
            {
                "model": model_name(record, records),
                "limit": limit(record),
                "method": method_name(record, "block_finetune"),
                "block": number,
                "layer": "all layers of a block",
                "moved": found.get("moved", math.nan),
                "loss": found["after"] / found["before"] if found["before"] else math.nan,
            }
            for record in records
            for number, found in enumerate(record.stages.get("block_finetune", {}).get("found", {}).get("blocks", []))
        ]
    )


def weight_table(records: list[Record]) -> pd.DataFrame:
    """The paper's pilot study, one row for each kind of layer: kurtosis, outliers, errors of methods by limit."""
    table = layer_table(records)
    if table.empty:
        return table
    shape = table.groupby("layer", sort=False)[["kurtosis", "outliers"]].mean()
    errors = table.pivot_table(
        index="layer", columns=["limit", "method"], values="relative error", aggfunc="mean", sort=False
    )
    errors.columns = pd.Index([f"error of {column[1]} at {column[0]}" for column in errors.columns.to_list()])
    return shape.join(errors).round(4).reset_index()
