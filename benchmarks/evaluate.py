"""Scores through us beside plain transformers and the `lm_eval` command: the same numbers, at what time?

    python benchmarks/evaluate.py [--data-root FOLDER] [--rounds 2] [--output FILE]

Perplexity of SmolLM2-135M over 40 windows of 512 tokens: evaluate, which reads block after block from the file, against
a loop over the windows that transformers has loaded whole; each from the folder to the number, in turn. Then 50 rows of
one task: our command against lm-eval's, each a process of its own. The text is WikiText-2 and the task ARC-easy, read
from a mirror laid out like the hub; without `--data-root` the text and a task made of it are Python's manual. Ratios
are of CPU time, which tells more where a machine is shared.
"""

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from goals import Goal, Times, finish, medians, show_times, timed
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp.command.compose import composed
from cluscomp.data.texts import PydocText
from cluscomp.models.original import Original
from cluscomp.stages.evaluate import Evaluate

CONTEXT, WINDOWS, ROWS, BATCH = 512, 40, 50, 8
MOST, APART = 1.05, 1e-4  # the goals: ratio of times, relative difference of perplexities
TASK = """task: bench
output_type: multiple_choice
validation_split: validation
test_split: null
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def settings(text: list[str], limit: int) -> Evaluate:
    """What the command line would build."""
    overrides = ["bits=3", *text, f"evaluate.context={CONTEXT}", f"evaluate.limit={limit}", "evaluate.batch_size=1"]
    found: Evaluate = composed(overrides).evaluate
    return found


def ours(folder: Path, text: list[str], limit: int) -> float:
    """The perplexity that evaluate finds for the model of a folder."""
    evaluate = settings(text, limit)
    original = Original(folder, torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as kept:
        return evaluate.evaluate(original, original, "original", {}, Path(kept), seed=0).scores[0].value


@torch.no_grad()
def plain(folder: Path, text: list[str], limit: int) -> float:
    """The same by a loop over the windows, as GPTQ's scripts and those after them do it."""
    (source,) = settings(text, limit).texts.values()
    rows = source.text("test")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)("\n\n".join(rows.rows), verbose=False).input_ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [model(window[None], labels=window[None]).loss for window in ids.split(CONTEXT)[:limit]]
    return math.exp(float(torch.stack(losses).double().mean()))


def task_files(data_root: Path | None, folder: Path) -> None:
    """Write the task `bench`: ARC-easy from a mirror, or which paragraph of Python's manual goes on as it began."""
    if data_root is not None:
        import lm_eval

        whole = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
        rows_of_it = f"dataset_path: {data_root / 'allenai/ai2_arc'}\ntraining_split: null\n"
        text = f"include: {whole}\ntask: bench\ntag: null\n{rows_of_it}"
    else:
        make, rows = random.Random(0), PydocText(name="pydoc").text("test").rows
        halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows if len(row) < 400]
        questions = []
        for number, (begin, end) in enumerate(halves[:ROWS]):
            choices = [end, *(make.choice(halves[:number] + halves[number + 1 :])[1] for _ in range(3))]
            order = make.sample(range(4), 4)
            questions.append({"question": begin, "choices": [choices[i] for i in order], "answer": order.index(0)})
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, questions)))
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {folder / 'rows.jsonl'}}}}}\n"
        text = TASK + files
    (folder / "bench.yaml").write_text(text)


def command(words: list[str]) -> Times:
    """Run a command of this Python; its CPU time and the time on the clock."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_ms": 1000 * cpu, "wall_ms": 1000 * (time.perf_counter() - wall)}


def asked_by_us(folder: Path, tasks: Path) -> tuple[dict[str, float], Times]:
    """Scores of the task by our command."""
    with tempfile.TemporaryDirectory() as outputs:
        times = command(
            [
                "cluscomp", "order=[evaluate]", "evaluate=none", "model=hub", f"model.id={folder}",
                "tasks.names=[bench]", f"tasks.include_path={tasks}", f"tasks.limit={ROWS}",
                f"tasks.batch_size={BATCH}", "dtype=float32", "device=cpu", f"outputs={outputs}",
            ]
        )  # fmt: skip
        (path,) = Path(outputs).glob("run-*/record.json")
        return {row["metric"]: row["value"] for row in json.loads(path.read_text())["scores"]}, times


def asked_by_lm_eval(folder: Path, tasks: Path) -> tuple[dict[str, float], Times]:
    """Scores of the task by lm-eval's own command."""
    with tempfile.TemporaryDirectory() as outputs:
        times = command(
            [
                "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", "bench",
                "--include_path", str(tasks), "--limit", str(ROWS), "--batch_size", str(BATCH), "--device", "cpu",
                "--output_path", outputs,
            ]
        )  # fmt: skip
        (path,) = Path(outputs).rglob("results*.json")
        found = json.loads(path.read_text())["results"]["bench"]
        return {metric: found[f"{metric},none"] for metric in ("acc", "acc_norm")}, times


def alternating(contenders: dict[str, Callable[[], tuple[Any, Times]]], rounds: int) -> tuple[dict, dict[str, Times]]:
    """What each contender gives, and its median times over rounds in which each runs once, in turn."""
    values: dict[str, Any] = {}
    times: dict[str, list[Times]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            values[name], found = call()
            times[name].append(found)
            print(f"  {name}: {values[name]}, {found['cpu_ms'] / 1000:.1f} s of CPU time", flush=True)
    return values, {name: medians(rounds_) for name, rounds_ in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="a mirror with WikiText-2 and ARC")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/evaluate.json"))
    options = parser.parse_args()
    began = datetime.now(UTC)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"  # of the commands
    text = ["data=pydoc"]
    if options.data_root is not None:
        text = ["data=wikitext2", f"data_root={options.data_root}"]
    source = composed(["bits=3", "model=smollm2_135m"]).model
    folder = source.folder(Path("~/.cache/cluscomp").expanduser())
    for score in (ours, plain):
        score(folder, text, 1)  # to warm up
    found, perplexity = alternating(
        {
            "evaluate": lambda: timed(lambda: ours(folder, text, WINDOWS)),
            "a plain loop": lambda: timed(lambda: plain(folder, text, WINDOWS)),
        },
        options.rounds,
    )
    apart = abs(found["evaluate"] / found["a plain loop"] - 1)
    with tempfile.TemporaryDirectory() as tasks:
        task_files(options.data_root, Path(tasks))
        answers, asked = alternating(
            {
                "cluscomp": lambda: asked_by_us(folder, Path(tasks)),
                "lm_eval": lambda: asked_by_lm_eval(folder, Path(tasks)),
            },
            options.rounds,
        )
    difference = max(abs(answers["cluscomp"][metric] - value) for metric, value in answers["lm_eval"].items())
    show_times(f"perplexity, {WINDOWS} windows of {CONTEXT}", perplexity)
    show_times(f"one task, {ROWS} rows, whole commands", asked)

    def ratio(times: dict[str, Times], first: str, second: str) -> float:
        return times[first]["cpu_ms"] / times[second]["cpu_ms"]

    goals = [
        Goal(
            "perplexity: evaluate over a plain loop, time",
            MOST,
            ratio(perplexity, "evaluate", "a plain loop"),
            "x",
            True,
        ),
        Goal("perplexity: values apart by", APART, apart, "", True),
        Goal("tasks: our command's time over lm_eval's", MOST, ratio(asked, "cluscomp", "lm_eval"), "x", True),
        Goal("tasks: scores apart by", 0.0, difference, "", True),
    ]
    figures = {"text": text[0], "perplexity": found | perplexity, "task": answers, "task times": asked}
    notes = {"method": " ".join(__doc__.split()), "rounds": str(options.rounds)}
    finish(goals, figures, notes, options.output, began)


if __name__ == "__main__":
    main()
