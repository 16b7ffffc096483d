"""Which settings tell runs of one method apart."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from cluscomp.report.names import limit, method_name, model_name, stages_until
from cluscomp.store.records import Record


def settings_that_differ(records: list[Record], *, known: bool = False) -> list[dict[str, Any]]:
    """For each record those settings of its stages that are not the same in all of them, by their dotted name.

    Of a stage that only some records have, those that are not the same in these. `known`: without settings that some of
    these do not have, as they were made before there was such a setting.
    """
    flat = [
        _flat({stage: record.config["stages"].get(stage, {}) for stage in record.config["order"]}, "")
        for record in records
    ]

    def differs(key: str) -> bool:
        stage = key.partition(".")[0]
        having = [values for record, values in zip(records, flat) if stage in record.config["order"]]
        if known and any(key not in values for values in having):
            return False
        return len({repr(values.get(key)) for values in having}) > 1

    differing = [key for key in dict.fromkeys(key for values in flat for key in values) if differs(key)]
    return [{key: values.get(key) for key in differing} for values in flat]


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif key != "class":  # which the name of the method stands for
            found[f"{prefix}{key}"] = value
    return found


def settings_apart(records: list[Record]) -> dict[tuple[str, str], str]:
    """For each run and stage the settings up to it that differ between runs of one model, method and limit.

    Those of the method are left out, which its name and the limit tell, and the text, which stands beside.
    """
    kinds: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        for after in record.config["order"]:
            kind = (model_name(record, records), limit(record), method_name(record, after), after)
            kinds.setdefault(kind, []).append(record)
    found = {}
    for (*_, after), rivals in kinds.items():
        for record, differing in zip(rivals, settings_that_differ(rivals, known=True)):
            stages = stages_until(record, after)
            told = ("cluster.method.", *(f"{stage}.data." for stage in stages))
            found[record.run["name"], after] = ", ".join(
                f"{key}={value}"
                for key, value in differing.items()
                if key.partition(".")[0] in stages and not key.startswith(told)
            )
    return found


def apart(rows: pd.DataFrame, cell: Sequence[str]) -> pd.Series:
    """The column `method` of rows, with a row's `settings` behind it where those alike in `cell` have several.

    So a mean over rows of one name is one over seeds alone.
    """
    several = rows.groupby(list(cell), dropna=False)["settings"].transform("nunique") > 1
    return rows["method"].where(~several | (rows["settings"] == ""), rows["method"] + " [" + rows["settings"] + "]")
