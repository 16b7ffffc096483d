"""Numbers that papers print, from CSV files whose every row names its source."""

import csv
import re
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from cluscomp.errors import InputError

UNPLACED = "unplaced.csv"  # rows whose model or bits are unknown, and what is no number
# What papers call a model, by its id on the hub.
MODELS = {
    "huggyllama/llama-7b": "Llama-1-7B",
    "huggyllama/llama-13b": "Llama-1-13B",
    "huggyllama/llama-30b": "Llama-1-30B",
    "huggyllama/llama-65b": "Llama-1-65B",
    "meta-llama/Llama-2-7b-hf": "Llama-2-7B",
    "meta-llama/Llama-2-13b-hf": "Llama-2-13B",
    "meta-llama/Llama-2-70b-hf": "Llama-2-70B",
    "meta-llama/Meta-Llama-3-8B": "Llama-3-8B",
    "llava-hf/llama3-llava-next-8b-hf": "LLaVA-Next-8B",
    "meta-llama/Meta-Llama-3-70B": "Llama-3-70B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B",
}
# The tokens of a window under the perplexity protocols that papers use; conf/evaluate holds the same by name.
CONTEXTS = {"gptq_2048": 2048, "aqlm_4096": 4096, "aqlm_8192": 8192}
Metric = Literal[
    "perplexity", "acc, %", "acc_norm, %", "accuracy, %", "score", "hours", "GPU memory, GB", "statement"
]  # "accuracy, %": which one is not stated


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Published:
    """One number as printed: perplexity, or an accuracy in percent.

    `bits_published` is what the paper calls it ("2 g128"), `bits_stored` what our ledger would count, or None where
    that does not follow from what is printed. `protocol` is the name of ours that measures the same, or empty. A row
    without a value says in `note` what is printed instead.
    """

    paper: str = Field(min_length=1)
    table: str = Field(min_length=1)
    model: str
    method: str = Field(min_length=1)
    bits_published: str
    bits_stored: float | None = Field(gt=0, le=32)
    protocol: Literal["", "gptq_2048", "aqlm_4096", "aqlm_8192", "zeroshot5", "mmlu_5shot"]
    dataset: str
    metric: Metric
    value: float | None = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=1)
    note: str

    @model_validator(mode="after")
    def _says_something(self) -> "Published":
        if self.value is None and not self.note:
            raise ValueError("value: without one, the note has to say what is printed instead")
        if self.value is not None and "%" in self.metric and self.value > 100:
            raise ValueError(f"value: {self.value} percent")
        return self

    @property
    def bits(self) -> float | None:
        """Stored bits where they are known, else the number that is printed, or None."""
        first = re.match(r"\d+(\.\d+)?", self.bits_published)
        return self.bits_stored or (float(first[0]) if first else None)


def read(path: Path) -> list[Published]:
    """All rows of one file. Raises InputError that names file, line and column of what is wrong."""
    names = list(Published.__dataclass_fields__)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            if lines.fieldnames != names:
                raise InputError(f"{path}, line 1: columns {lines.fieldnames}; they have to be {', '.join(names)}")
            return [_row(path, lines.line_num, values) for values in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _row(path: Path, line: int, values: dict[str, str]) -> Published:
    optional = {name: values[name] or None for name in ("bits_stored", "value")}
    cells = [*values.values()]
    if None in values or None in cells:
        raise InputError(f"{path}, line {line}: not as many cells as there are columns")
    try:
        return TypeAdapter(Published).validate_python(values | optional)
    except ValidationError as error:
        problem = error.errors()[0]
        column = f", column {problem['loc'][0]} = {problem['input']!r}" if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}, line {line}{column}: {message}") from error


def read_folder(folder: Path) -> list[Published]:
    """The rows of all files of a folder that can stand in a table: model and, of a score, bits are known.

    Raises InputError as `read`, and for a number of one model, method, bits, data set and metric that one table of a
    paper prints twice.
    """
    rows: list[Published] = []
    for path in sorted(folder.glob("*.csv")):
        if path.name == UNPLACED:
            continue
        for number, row in enumerate(read(path), start=1):
            if not row.model or (row.bits is None and row.metric not in ("hours", "GPU memory, GB")):
                raise InputError(f"{path}, row {number}: model or bits_published is empty; such rows go to {UNPLACED}")
            rows.append(row)
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        key = (row.paper, row.table, row.model, row.method, row.bits_published, row.dataset, row.metric)
        if key in seen:
            raise InputError(f"{folder}: printed twice: {', '.join(key)}")
        seen.add(key)
    return rows
