"""Stage cluster of blocks of SmolLM2-135M's shapes by one process and by two of one thread each: time, the same bits.

    python benchmarks/ranks.py [--blocks 4] [--ranks 2] [--output FILE] [SETTING=VALUE ...]

Each is a run of the command as a user starts it, alone or by torchrun; the time is that of the stage, from its record.
Weights are random. Each rank embeds the calibration text, which weighs more here than in a model of more blocks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from goals import Goal, finish

GOAL = 0.6
SHAPES = [  # of SmolLM2-135M
    "model=tiny", "model.config.hidden_size=576", "model.config.intermediate_size=1536",
    "model.config.num_attention_heads=9", "model.config.num_key_value_heads=3", "device=cpu",
]  # fmt: skip
MORE = ["bits=3", "evaluate.after=[]", "evaluate.context=512"]


def clustered(ranks: int, blocks: int, more: list[str]) -> dict[str, Any]:
    """The record of a run."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = ["-m", "cluscomp", *SHAPES, f"model.config.num_hidden_layers={blocks}", *MORE]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, *command, f"outputs={folder}", *more], check=True, env=environment)
        (path,) = Path(folder).glob("run-*/record.json")
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/ranks.json"))
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    began = datetime.now(UTC)
    found = {ranks: clustered(ranks, options.blocks, options.settings) for ranks in (1, options.ranks)}
    seconds = {ranks: record["run"]["seconds"]["cluster"] for ranks, record in found.items()}
    hashes = {record["stages"]["cluster"]["checkpoint_hash"] for record in found.values()}
    label = f"cluster of {options.blocks} blocks by {options.ranks} ranks"
    goals = [
        Goal(f"{label}: wall time over that of one", GOAL, seconds[options.ranks] / seconds[1], at_most=True),
        Goal(f"{label}: other bits than those of one", 0, len(hashes) - 1, unit="", at_most=True),
    ]
    notes = {"method": " ".join(__doc__.split()), "settings": " ".join(options.settings)}
    finish(goals, {label: {"seconds": seconds}}, notes, options.output, began)


if __name__ == "__main__":
    main()
