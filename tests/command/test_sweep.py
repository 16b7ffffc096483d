"""A sweep of 4 cells by two processes on one outputs folder, members of which are killed at random moments."""

import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from forks import until

BLOCKS = 2
ORDER = ["cluster", "block_finetune"]
CELLS = ["method.codebook_size=8,16", "block_finetune.epochs=2,4"]
COUNT, CLUSTERINGS = 4, 2
TOTAL = CLUSTERINGS + COUNT + COUNT  # both stages, and the evaluation after the second
KILLS = int(os.environ.get("CLUSCOMP_KILLS", "2"))
SETTINGS = [
    "-m", "model=tiny", f"model.config.num_hidden_layers={BLOCKS}", "data=text", "method=cluscomp_data_free",
    "method.vector_dim=4", "method.iterations=20", f"order=[{','.join(ORDER)}]", "block_finetune=quick",
    "block_finetune.length=32", "block_finetune.samples=8", "block_finetune.batch_size=4", "evaluate.context=32",
    "evaluate.limit=4", "evaluate.distance=true", "evaluate.after=[block_finetune]", "name=cells", "device=cpu", *CELLS,
]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> Callable[[Path], list[str]]:
    ground = tmp_path_factory.mktemp("ground")
    rows = [f"Paragraph {i} says that the quick brown fox jumped over the lazy dog {7 * i} times." for i in range(100)]
    (ground / "text.txt").write_text("\n\n".join(rows))
    return lambda outputs: [
        *SETTINGS,
        f"data.file={ground / 'text.txt'}",
        f"cache={ground / 'cache'}",
        f"outputs={outputs}",
    ]


def results(outputs: Path) -> dict[str, tuple]:
    """Hashes of the checkpoints and scores of each finished run by its key."""
    records = [json.loads(path.read_text()) for path in outputs.glob("run-*/record.json")]
    return {
        record["run"]["key"]: (
            {name: stage["checkpoint_hash"] for name, stage in record["stages"].items()},
            record["scores"],
        )
        for record in records
    }


def finished(outputs: Path) -> dict[Path, tuple[int, int]]:
    """What is finished, with what would tell that it was written again."""
    found = {}
    for pattern in ("*/metrics.json", "run-*/record.json"):
        for path in outputs.glob(pattern):
            found[path] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def stages_done(outputs: Path) -> int:
    return len(list(outputs.glob("*/metrics.json")))


@pytest.fixture(scope="module")
def undisturbed(forks, arguments, tmp_path_factory) -> tuple[Path, list[str]]:
    """The outputs of two processes that nobody killed, and what they told."""
    place = tmp_path_factory.mktemp("undisturbed")
    outputs, logs = place / "outputs", [place / "first", place / "second"]
    workers = [forks.start(log, *arguments(outputs)) for log in logs]
    assert [forks.wait(worker) for worker in workers] == [0, 0], [log.read_text() for log in logs]
    return outputs, [log.read_text() for log in logs]


@pytest.mark.slow
def test_two_processes_killed_again_and_again_finish_the_sweep_and_do_nothing_twice(
    forks, arguments, undisturbed, tmp_path
):
    outputs, rng = tmp_path / "outputs", random.Random(0)
    logs = [tmp_path / f"log-{number}" for number in range(2)]
    start = lambda number: forks.start(logs[number], *arguments(outputs))  # noqa: E731
    workers, before = [start(0), start(1)], {}
    for target in sorted(rng.randrange(TOTAL - 2) for _ in range(KILLS)):
        until(partial(lambda least: stages_done(outputs) >= least, target), 600)
        time.sleep(rng.uniform(0, 0.5))
        member = rng.randrange(2)
        forks.kill(workers[member])
        now = finished(outputs)
        assert before.items() <= now.items()  # what was finished stays as it was
        before, workers[member] = now, start(member)
    for worker in workers:
        forks.kill(worker)
    kills, before = KILLS + 2, finished(outputs)
    assert len(before) < TOTAL + COUNT, "too late: the sweep had ended"

    assert forks.wait(start(0)) == 0, logs[0].read_text()
    assert before.items() <= finished(outputs).items() and len(finished(outputs)) == TOTAL + COUNT
    cells = [json.loads(path.read_text()) for path in outputs.glob("cells/cells/*/cell.json")]
    assert [cell["state"] for cell in cells] == ["finished"] * COUNT
    left = [path for path in outputs.rglob("*") if path.name.startswith(("lock", ".", "block-"))]
    assert not left

    told = "".join(log.read_text() for log in logs)
    for name, folders in {"cluster": CLUSTERINGS, "block_finetune": COUNT}.items():
        done = told.count(f"{name}  block {BLOCKS}/{BLOCKS}")
        assert folders <= done <= folders + kills  # a kill can come between the last block and the end of the stage
    assert len(results(outputs)) == COUNT and results(outputs) == results(undisturbed[0])


@pytest.mark.slow
def test_two_processes_share_the_cells_of_a_sweep(undisturbed):
    """Each finishes some, though both go through all of them in the same order."""
    outputs, logs = undisturbed
    told = [log.count(f"block_finetune  block {BLOCKS}/{BLOCKS}") for log in logs]
    assert sum(told) == COUNT and min(told) >= 1
    assert not list(outputs.rglob("lock"))
