"""What the benchmarks share: paired timing, the table "what | goal | measured | met", and the JSON file."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluscomp.kernels.loading import native

Times = dict[str, float]  # cpu_ms (of the process, all threads) and wall_ms


@dataclass(frozen=True)
class Goal:
    """One row: a figure that should be at least (or, with `at_most`, at most) `goal`; None is measured, not judged."""

    what: str
    goal: float | None
    measured: float
    unit: str = "x"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Whether the goal is met, in a word."""
        if self.goal is None:
            return "-"
        met = self.measured <= self.goal if self.at_most else self.measured >= self.goal
        return "met" if met else "MISSED"


def timed(call: Callable[[], Any]) -> tuple[Any, Times]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, {"cpu_ms": 1000 * (time.process_time() - cpu), "wall_ms": 1000 * (time.perf_counter() - wall)}


def paired(
    contenders: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], Any] | None = None
) -> dict[str, Times]:
    """Medians over rounds in which every contender runs once, in turn, after one round to warm up.

    `before` is called before each, outside of the time.
    """
    found: dict[str, list[Times]] = {name: [] for name in contenders}
    for r in range(repeats + 1):
        for name, call in contenders.items():
            if before is not None:
                before()
            _, times = timed(call)
            if r > 0:
                found[name].append(times)
    return {name: medians(rounds) for name, rounds in found.items()}


def medians(rounds: list[Times]) -> Times:
    return {key: statistics.median(times[key] for times in rounds) for key in rounds[0]}


def show_times(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}: ms of process CPU time, and of wall time")
    for name, row in rows.items():
        print(f"  {name:44s} {row['cpu_ms']:11.2f} {row['wall_ms']:11.2f}", flush=True)


def finish(goals: list[Goal], figures: dict[str, Any], notes: dict[str, str], path: Path, began: datetime) -> None:
    """Print the table and write everything to `path`; rows there that were not measured now stay, with their date."""
    width = max(len(goal.what) for goal in goals)
    print(f"\n{'what':{width}s} | {'goal':>12s} | {'measured':>10s} | met")
    for goal in goals:
        sign = "at most" if goal.at_most else "at least"
        wanted = "" if goal.goal is None else f"{sign if goal.goal else ''} {goal.goal:g}{goal.unit}"
        print(f"{goal.what:{width}s} | {wanted:>12s} | {goal.measured:8.4g}{goal.unit:2s} | {goal.verdict}")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {"goals": [], "figures": {}}
    date = began.isoformat(timespec="seconds")
    rows = {goal.what: asdict(goal) | {"verdict": goal.verdict, "began": date} for goal in goals}
    report = {
        "goals": list(({row["what"]: row for row in before["goals"]} | rows).values()),
        "figures": before["figures"] | figures,
        "notes": notes,
        "machine": machine() | {"began": date},
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def machine() -> dict[str, Any]:
    """What ran, on what, when, and how busy the machine was besides."""
    packages = ("cluscomp", "torch", "numpy", "faiss-cpu", "scikit-learn", "transformers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "instruction_set": native.instruction_set() if native else "none: the kernels were not compiled",
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := installed(name)) is not None},
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = dict((part.strip() for part in line.split(":", 1)) for line in reversed(lines) if ":" in line)
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else name


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
