"""What a sweep's cells share: 24 cells of the tiny model with the cache and without, a kill in the middle, start-up.

    python benchmarks/sweep.py [--output FILE]

3 bit targets x 4 budgets of finetuning x 2 seeds. With the cache all cells have one outputs folder; without, each has
its own. Both run in this process, so that start-up is in neither figure. Then the same sweep as a command is killed
when half of it is finished, and started again: what had been finished must not be written a second time.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import transformers
from goals import Goal, finish

from cluscomp.command.compose import composed
from cluscomp.runs.run import run

GRID = {"bits": [4, 3, 2], "block_finetune.samples": [4, 8, 16, 32], "seed": [0, 1]}
SETTINGS = [
    "name=cells", "model=tiny", "data=text", "order=[cluster,block_finetune]", "block_finetune=quick",
    "block_finetune.length=32", "block_finetune.batch_size=4", "cluster.samples=16", "cluster.length=32",
    "evaluate.context=32", "evaluate.limit=8", "device=cpu",
]  # fmt: skip
REPEATS = 3  # of what is timed as a whole process
START = """
import json, sys, time
times, last = {}, time.perf_counter()
def done(what):
    global last
    now = time.perf_counter()
    times[what], last = now - last, now
from cluscomp.command.compose import composed
done("imports of the command")
experiment = composed(sys.argv[1:])
done("compose and check")
import torch
done("import of torch")
import transformers
from cluscomp.models.files import fingerprint
from cluscomp.models.quantised import opened
done("import of transformers and what needs torch")
from pathlib import Path
folder = experiment.model.folder(Path(experiment.cache))
opened(folder, torch.float32, torch.device("cpu"), to_score=False), fingerprint(folder)
done("model open")
print(json.dumps(times))
"""


def overrides(place: Path, outputs: Path) -> list[str]:
    text = place / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says that {i * i} is the square of {i}." for i in range(400)))
    return [*SETTINGS, f"data.file={text}", f"cache={place / 'cache'}", f"outputs={outputs}"]


def cells() -> list[list[str]]:
    return [[f"{key}={value}" for key, value in zip(GRID, values)] for values in itertools.product(*GRID.values())]


def cpu_seconds(place: Path, name: str, *, shared: bool) -> float:
    """Of this process, for all cells."""
    used = 0.0
    for number, cell in enumerate(cells()):
        given = [*overrides(place, place / name / ("all" if shared else str(number))), *cell]
        began = time.process_time()
        run(composed(given))
        used += time.process_time() - began
        print(f"{name}  cell {number + 1}/{len(cells())}  {used:.1f} CPU seconds", flush=True)
    return used


def finished(outputs: Path) -> dict[str, tuple[int, int]]:
    """What is finished, with what would tell that it was written again."""
    paths = [*outputs.glob("*/metrics.json"), *outputs.glob("run-*/record.json")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def killed_and_restarted(place: Path) -> dict[str, int]:
    outputs = place / "killed"
    grid = [f"{key}={','.join(map(str, values))}" for key, values in GRID.items()]
    command = [sys.executable, "-m", "cluscomp", "-m", *overrides(place, outputs), *grid]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(outputs.glob("run-*/record.json"))) < len(cells()) // 2:
        if first.poll() is not None:
            raise RuntimeError("the sweep ended before it could be killed")
        time.sleep(0.05)
    first.kill()
    first.wait()
    before = finished(outputs)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = finished(outputs)
    again = sum(after.get(path) != written for path, written in before.items())
    return {"finished at the kill": len(before), "finished at the end": len(after), "of those, done again": again}


def process_seconds(*arguments: str) -> dict[str, float]:
    """The least of some tries of a whole process, on the clock and of the processor."""
    tries = []
    for _ in range(REPEATS):
        usage, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "cluscomp", *arguments], check=True, stdout=subprocess.DEVNULL)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime
        tries.append({"wall_s": time.perf_counter() - began, "cpu_s": cpu})
    return {key: min(one[key] for one in tries) for key in tries[0]}


def start_up(place: Path) -> dict[str, float]:
    """Seconds on the clock until the model is open, by cause: the least of some tries."""
    given = [*overrides(place, place / "start"), "bits=3"]
    tries = []
    for _ in range(REPEATS):
        done = subprocess.run([sys.executable, "-c", START, *given], check=True, capture_output=True, text=True)
        tries.append(json.loads(done.stdout))
    return {cause: min(one[cause] for one in tries) for cause in tries[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/bench/sweep.json"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cached = cpu_seconds(place, "with the cache", shared=True)
        alone = cpu_seconds(place, "without", shared=False)
        kill = killed_and_restarted(place)
        causes = start_up(place)
        help_, shown = process_seconds("--help"), process_seconds("bits=3", "--cfg", "job")
    goals = [
        Goal("CPU seconds of 24 cells without the cache over with it", 3.0, alone / cached),
        Goal("killed in the middle: finished parts done again", 0.0, kill["of those, done again"], "", True),
        Goal("cluscomp --help, CPU seconds", 1.5, help_["cpu_s"], "s", True),
        Goal("cluscomp bits=3 --cfg job, CPU seconds", 1.5, shown["cpu_s"], "s", True),
        Goal("start-up of a cell until the model is open, on the clock", None, sum(causes.values()), "s"),
    ]
    figures = {
        "cpu_seconds": {"with the cache": cached, "without": alone},
        "killed": kill,
        "start_up_seconds": causes,
        "help": help_,
        "cfg job": shown,
    }
    finish(goals, figures, {"method": " ".join(__doc__.split())}, options.output, began)


if __name__ == "__main__":
    main()
