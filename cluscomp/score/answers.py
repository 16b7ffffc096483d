"""Answers to tasks, row by row: kept as files, and compared with those of another model."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Answers = Sequence[dict[str, Any]]  # to tasks, row by row
CORRECT = ("acc", "exact_match")  # metrics that are 1 or 0 for an answer, the first a task has counts its flips


def answers_in(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Every answer of lm-eval's samples without the question, which its hash names: task, row, responses, ...."""
    for task, rows in samples.items():
        for row in rows:
            names = ("doc_id", "filter", "target", "filtered_resps", "doc_hash", "prompt_hash", *row["metrics"])
            yield {"task": task} | {name: row[name] for name in names}


def write_answers(path: Path, answers: Sequence[dict[str, Any]]) -> None:
    """Write answers as JSON lines, compressed; equal answers make equal files."""
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for row in answers:
            file.write((json.dumps(row, default=str) + "\n").encode())


def read_answers(path: Path) -> list[dict[str, Any]]:
    """What `write_answers` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def flipped(original: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """For each task with right and wrong answers: how many changed, and of how many. Its first filter's count.

    A task with any value but 0 and 1 has none: its acc is a probability, which hardly ever stays the same.
    """
    before = {(row["task"], row["filter"], row["doc_id"]): row for row in original}
    found: dict[str, tuple[int, int]] = {}
    probable: set[str] = set()
    first = {row["task"]: row["filter"] for row in reversed(answers)}
    for row in (row for row in answers if row["filter"] == first[row["task"]]):
        metric = next((name for name in CORRECT if name in row), None)
        other = before.get((row["task"], row["filter"], row["doc_id"]))
        if metric is not None and other is not None:
            flips, count = found.get(row["task"], (0, 0))
            found[row["task"]] = flips + (row[metric] != other[metric]), count + 1
            if not {row[metric], other[metric]} <= {0, 1}:
                probable.add(row["task"])
    return {task: counts for task, counts in found.items() if task not in probable}
