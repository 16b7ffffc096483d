"""Every method on the layers of one block of SmolLM2-135M at 3 stored bits: time, memory, error of the weights.

    python benchmarks/methods.py [--methods NAME ...] [--output FILE]

Each method works in a process of its own, on one thread; the statistics of the layers' inputs (8 windows of 512 tokens
of Python's manual) are made before and not in the time, which is also told as a multiple of cluscomp's in the same run.
Peak memory is the operating system's count for the process, libraries included. `method=autoround` and `omniquant`
compress as rtn does and learn afterwards, which is no part of this. `authors.py` times methods beside their authors'
own code.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from goals import Goal, finish, show_times, timed
from torch import nn

from cluscomp.command import compose
from cluscomp.command.compose import CONF
from cluscomp.models.original import Original, linears
from cluscomp.models.walk import Walk
from cluscomp.plan.meta import MetaModel
from cluscomp.plan.places import Place
from cluscomp.runs.experiment import Experiment
from cluscomp.solve.layer import Seen
from cluscomp.stages.clustering import compress_block
from cluscomp.stages.observing import observe

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if "_global_" not in path.read_text())
BLOCK, BITS = 2, 3
CALIBRATION = ["data=pydoc", "cluster.samples=8", "cluster.length=512"]


def composed(*overrides: str) -> Experiment:
    """What the command line would build."""
    return compose.composed([*overrides, *CALIBRATION])


def opened(experiment: Experiment) -> Original:
    folder = experiment.model.folder(Path(experiment.cache).expanduser())
    return Original(folder, torch.float32, torch.device("cpu"))


def looked(experiment: Experiment) -> tuple[Original, nn.Module, dict[str, Seen]]:
    """The original, the block, and what the experiment's method asks to see of its layers' inputs."""
    cluster: Any = experiment.stages["cluster"]
    original = opened(experiment)
    model = original.model()
    walk = Walk(model, original)
    statistics: dict[str, Seen] = {}
    if cluster.method.sees():
        windows = torch.from_numpy(cluster.windows(original.tokenizer, 0))
        with torch.no_grad():
            stream = [walk.embed(ids_BT) for ids_BT in windows.split(cluster.batch_size)]
            for index in range(BLOCK + 1):
                with original.block(model, index) as block:
                    asked = [*linears(block)] if index == BLOCK else []
                    stream, statistics = observe(cluster.sees, walk, index, stream, layers=asked)
    original.load_block(model, BLOCK)
    return original, walk.blocks[BLOCK], statistics


def places(original: Original) -> dict[str, Place]:
    """Where the layers of the block stand in it."""
    return MetaModel(original.config, torch.float32, "cpu").places()[BLOCK]


def measure(method: str) -> dict[str, Any]:
    """Compress the block once, in this process."""
    torch.set_num_threads(1)
    experiment = composed(f"method={method}", f"bits={BITS}")
    cluster: Any = experiment.stages["cluster"]
    original, block, statistics = looked(experiment)
    of_block, name = places(original), f"block {BLOCK}"
    found, times = timed(lambda: compress_block(cluster.method, block, name, 0, statistics, of_block))
    layers = [module.stored for module in block.modules() if hasattr(module, "stored")]
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    stored_bits = sum(sum(layer.ledger().values()) for layer in layers)
    error, size = (sum(values) for values in zip(*found["squares"].values()))
    return times | {
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "bits": stored_bits / weights,
        "bits_in_memory": (stored_bits + 8 * sum(layer.decoded_bytes() for layer in layers)) / weights,
        "relative_error": error / size,
    }


def measured(method: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, __file__, "--one", method, "--output", file.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads(Path(file.name).read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--one", choices=METHODS, help="measure this one in this process, and write it to the output")
    parser.add_argument("--output", type=Path, default=Path("results/bench/methods.json"))
    options = parser.parse_args()
    if options.one:
        options.output.write_text(json.dumps(measure(options.one)))
        return
    began = datetime.now(UTC)
    rows = {method: measured(method) for method in options.methods}
    show_times(f"layers of block {BLOCK} at {BITS} bits", rows)
    goals = []
    for method, row in rows.items():
        goals += [
            Goal(f"{method}: CPU time of a block", None, row["cpu_ms"] / 1000, "s"),
            Goal(f"{method}: peak memory", None, row["peak_gib"], "GiB"),
            Goal(f"{method}: stored bits at most", BITS, row["bits"], "", True),
        ]
        if "cluscomp" in rows:
            goals.append(Goal(f"{method}: CPU time beside cluscomp", None, row["cpu_ms"] / rows["cluscomp"]["cpu_ms"]))
    finish(goals, rows, {"method": " ".join(__doc__.split())}, options.output, began)


if __name__ == "__main__":
    main()
