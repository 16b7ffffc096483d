"""What models learned from: texts, and how many tokens. Models that learned from unlike texts are ranked apart."""

import math
from dataclasses import replace
from typing import Any

import pandas as pd

from cluscomp.errors import InputError
from cluscomp.report.names import stages_until
from cluscomp.store.records import EXTERNAL, ORIGINAL, Record, Score

CALIBRATION, TRAINING = "calibration tokens", "training tokens"
UNTRAINED = ("round", "decompose", "cluster", "cut")  # stages that compress and train nothing
Kind = tuple[str, int]  # what a model learned from, and the tokens that its compression looked at; 0 if not known


def learned_from(record: Record, after: str) -> str:
    """The texts that the stages up to one looked at or trained on, with their splits; "" if none, or none is known.

    Of an external model the domain of its calibration text, as its maker or file states it.
    """
    if after == EXTERNAL:
        return str(record.stages[EXTERNAL]["found"].get("calibration") or "")
    return ", ".join(sorted({_named(data) for data in _data(record, after)}))


def in_domain(record: Record, score: Score) -> bool:
    """Whether a stage learned from a text of the scored text's domain; in older records, from the same data set."""
    known = {data["name"] for data in _data(record, score.after)}
    return score.dataset in known or any(one["in_domain"] for one in score.seen.values())


def tokens(record: Record, after: str) -> dict[str, float]:
    """Tokens of text that a model's compression looked at, and those its training went through; NaN: not known."""
    if after == EXTERNAL:
        return dict.fromkeys((CALIBRATION, TRAINING), math.nan)
    looked, trained = 0, 0.0
    for stage in stages_until(record, after):
        settings, found = record.config["stages"].get(stage, {}), _found(record, stage)
        if stage not in UNTRAINED:  # block_finetune tells the tokens of one epoch, others those of all steps
            trained += found.get("tokens", math.nan) * (settings["epochs"] if stage == "block_finetune" else 1)
        elif "calibration" in found:
            looked = max(looked, settings["samples"] * settings["length"])  # of one text and seed: the same windows
    return {CALIBRATION: looked, TRAINING: trained}


def where_told(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns of tokens that no row has any of."""
    known = [name for name in (CALIBRATION, TRAINING) if name in table.columns]
    return table.drop(columns=[name for name in known if not table[name].fillna(0).any()])


def by_text(records: list[Record]) -> dict[str, list[Record]]:
    """The records for each text that models learned from, with the scores of such models.

    Calibration on unlike numbers of tokens of a text counts as unlike texts, of which the names then tell the number.
    What learned from no text, or from one that is not known, stands with all; an external model with texts of the
    domain that it states.
    """
    kinds = {_kind(record, score.after): _domains(record, score.after) for record in records for score in record.scores}

    def fits(kind: Kind, other: Kind) -> bool:
        return kind[0] in {"", other[0], *kinds[other]} and kind[1] in (0, other[1])

    ranked = sorted(kind for kind in kinds if not any(fits(kind, other) for other in kinds if other != kind))
    if len(ranked) < 2:
        return {"".join(text for text, _ in ranked): records}
    found = {}
    for text, count in ranked:
        several = [one for one, _ in ranked].count(text) > 1
        alike = [
            replace(one, scores=[score for score in one.scores if fits(_kind(one, score.after), (text, count))])
            for one in records
        ]
        found[f"{text}, {count} tokens" if several else text] = [
            one for one in alike if any(score.after != ORIGINAL for score in one.scores)
        ]
    return found


def check_texts(records: list[Record]) -> None:
    """Raise InputError if models that learned from unlike texts would be ranked together."""
    if len(texts := by_text(records)) > 1:
        raise InputError(
            f"models that learned from unlike texts ({'; '.join(texts)}) cannot be ranked in one table: make one of "
            "each part of report.learned.by_text(records)"
        )


def _kind(record: Record, after: str) -> Kind:
    return learned_from(record, after), 0 if after == EXTERNAL else int(tokens(record, after)[CALIBRATION])


def _found(record: Record, stage: str) -> dict[str, Any]:
    return dict(record.stages[stage].get("found", {}))


def _data(record: Record, after: str) -> list[dict[str, Any]]:
    """Settings of the texts that the stages up to one looked at: a method that needs none leaves its text alone."""
    looked = [(one, _found(record, one)) for one in stages_until(record, after)]
    return [
        record.config["stages"].get(one, {}).get("data") or {"name": found["calibration"]["text"]}
        for one, found in looked
        if "calibration" in found
    ]


def _domains(record: Record, after: str) -> set[str]:
    if after == EXTERNAL:
        return {learned_from(record, after)}
    return {data.get("domain", data["name"]) for data in _data(record, after)}


def _named(data: dict[str, Any]) -> str:
    if "shares" in data:  # of a mixture's parts
        return " + ".join(f"{share:g} {_named(part)}" for share, part in zip(data["shares"], data["parts"].values()))
    return "/".join(filter(None, (data["name"], data.get("calibration"))))
