"""What the planner said beside what a run took: bytes, peak memory (the operating system's count) and time.

    python benchmarks/plan.py [--calibrate] [--configurations NAME ...] [--output FILE]

Each configuration is a whole run of the command in a process of its own; the figures are those of its record. The
goals: bytes exact, memory within 15 %, time within a factor of 2 of what was measured (time only with --calibrate, and
on a machine without other work; stages of less than a second are not held to it).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from goals import Goal, finish

from cluscomp.command.compose import CONF

SHORT = ["evaluate.context=512", "evaluate.limit=8", "block_finetune=quick", "block_finetune.samples=4"]
DATA_FREE = ["method=cluscomp_data_free", "method.vector_dim=4", "method.codebook_size=256"]
CONFIGURATIONS = {
    "data-free D4 K256": [*DATA_FREE, "order=[cluster,block_finetune]", "block_finetune.epochs=1", *SHORT],
    "inputs D8 K4096": ["method.vector_dim=8", "method.codebook_size=4096", "cluster.samples=8", *SHORT],
    "data-free 3 bits": ["method=cluscomp_data_free", "bits=3", *SHORT],
    "inputs D4 K1024 bfloat16": [
        *("dtype=bfloat16", "method.vector_dim=4", "method.codebook_size=1024", "cluster.samples=8"),
        *("order=[cluster,block_finetune]", *SHORT),
    ],
    "recover, finetune": [
        *DATA_FREE,
        "order=[cluster,recover,finetune]",
        "recover=quick",
        "recover.tokens=4096",
        "finetune.length=256",
        "finetune.examples=16",
        "finetune.epochs=1",
        "finetune.held_out=8",
        "evaluate.after=[]",
    ],
    "demo": ["experiment=demo"],
}
# Every method on two blocks of SmolLM2's shapes, with random weights, then one epoch of finetuning.
TWO_BLOCKS = [
    "model=tiny", "model.config.hidden_size=576", "model.config.intermediate_size=1536",
    "model.config.num_attention_heads=9", "model.config.num_key_value_heads=3", "model.config.num_hidden_layers=2",
    "order=[cluster,block_finetune]", "bits=3", "cluster.samples=8", "evaluate.after=[]", "evaluate.context=512",
    "block_finetune=quick",
    "block_finetune.samples=8", "block_finetune.epochs=1",
]  # fmt: skip
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if "_global_" not in path.read_text())
CONFIGURATIONS |= {method: [*TWO_BLOCKS, f"method={method}"] for method in METHODS}


def record_of(overrides: list[str]) -> dict[str, Any]:
    """The record of a fresh run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cluscomp", f"outputs={folder}", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("run-*/record.json")
        return dict(json.loads(path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrate", action="store_true", help="measure this machine before each run")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--output", type=Path, default=Path("results/bench/plan.json"))
    options = parser.parse_args()
    began = datetime.now(UTC)
    goals, figures = [], {}
    for name in options.configurations:
        if options.calibrate:  # each time: other users of a shared machine change its speed from minute to minute
            command = [sys.executable, "-m", "cluscomp", "plan", "--calibrate", *CONFIGURATIONS[name]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        record = record_of(CONFIGURATIONS[name])
        told = record["machine"]["predicted"]
        measured = {"peak_ram": record["machine"]["peak_ram"], "seconds": record["run"]["seconds"]}
        figures[name] = {"predicted": told, "measured": measured | {"bytes": record["size"]["checkpoint_bytes"]}}
        ratio = told["checkpoint_bytes"] / record["size"]["checkpoint_bytes"]
        goals.append(Goal(f"{name}: bytes, predicted off by", 0.0 if told["exact"] else None, abs(ratio - 1), "", True))
        for kind, limit in (("peak_ram", 1.15), ("seconds", 2.0 if told["calibrated"] else None)):
            for stage, value in measured[kind].items():
                ratio = told[kind][stage] / value
                most = None if kind == "seconds" and value < 1 else limit
                print(
                    f"{name:24s} {stage:24s} {kind:9s} {told[kind][stage]:14.1f} {value:14.1f} {ratio:6.2f}", flush=True
                )
                factor = max(ratio, 1 / ratio) if ratio else math.inf
                goals.append(Goal(f"{name}: {kind} of {stage}, predicted off by a factor of", most, factor, "", True))
    finish(goals, figures, {"method": " ".join(__doc__.split())}, options.output, began)


if __name__ == "__main__":
    main()
