"""Several processes at one run, ranks, forked and started as torchrun does: what they make is what one makes."""

import json
import os
import random
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from forks import until

BLOCKS, ORDER = 3, ["cluster", "block_finetune"]
SMALL = [
    "model=tiny", f"model.config.num_hidden_layers={BLOCKS}", "data=text", f"order=[{','.join(ORDER)}]", "device=cpu",
    "method.vector_dim=4", "method.codebook_size=64", "method.iterations=50", "method.assign=hessian",
    "cluster.samples=4", "cluster.length=32", "cluster.batch_size=2", "block_finetune=quick",
    "block_finetune.length=32", "block_finetune.samples=7", "block_finetune.batch_size=4", "block_finetune.held_out=2",
    "block_finetune.epochs=2",
    "evaluate.context=32", "evaluate.limit=5", "evaluate.batch_size=2", "evaluate.distance=true",
]  # fmt: skip
KILLS = int(os.environ.get("CLUSCOMP_KILLS", "1"))


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    rows = [f"Paragraph {i} says that the quick brown fox jumped over the lazy dog {7 * i} times." for i in range(100)]
    (folder / "text.txt").write_text("\n\n".join(rows))
    return folder


def start(forks, ground: Path, name: str, world: int, *more: str) -> list[int]:
    """The processes of a run whose outputs are in a folder of this name, with a log for each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = []
    for rank in range(world):
        variables = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} if world > 1 else {}
        command = [*SMALL, f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", f"outputs={ground / name}"]
        found.append(forks.start(ground / f"{name}-{rank}.log", *command, *more, variables=variables))
    return found


def record_of(forks, ground: Path, name: str, pids: list[int]) -> dict:
    logs = [ground / f"{name}-{rank}.log" for rank in range(len(pids))]
    assert [forks.wait(pid) for pid in pids] == [0] * len(pids), [log.read_text()[-2000:] for log in logs]
    assert "| original" in logs[0].read_text() and not any(log.read_text() for log in logs[1:])
    (path,) = (ground / name).glob("run-*/record.json")
    return json.loads(path.read_text())


def same(one: dict, other: dict) -> None:
    """Clustering and scores bit for bit, and losses of training but for the order in which gradients are added."""
    assert one["run"]["key"] == other["run"]["key"]
    first, second = (record["stages"]["cluster"] for record in (one, other))
    assert first["checkpoint_hash"] == second["checkpoint_hash"] and first["found"] == second["found"]
    scores = [[row for row in record["scores"] if row["after"] != "block_finetune"] for record in (one, other)]
    assert scores[0] == scores[1] and len(scores[0]) > 4
    blocks = [record["stages"]["block_finetune"]["found"]["blocks"] for record in (one, other)]
    for here, there in zip(*blocks, strict=True):
        for name in ("before", "after", "held_out_before", "held_out_after"):
            assert here[name] == pytest.approx(there[name], rel=1e-5)


@pytest.fixture(scope="module")
def alone(forks, ground) -> dict:
    return record_of(forks, ground, "alone", start(forks, ground, "alone", 1))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_make_what_one_process_makes(forks, ground, alone, world):
    name = f"of-{world}"
    same(record_of(forks, ground, name, start(forks, ground, name, world)), alone)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_another_number_of_ranks_goes_on(forks, ground, alone):
    """A rank of three dies at a random moment; then one of two, and so on; two end with the same bits."""
    rng = random.Random(KILLS)
    for kill in range(KILLS):
        name, world = f"killed-{kill}", rng.choice([2, 3])
        pids, victim = start(forks, ground, name, world), rng.randrange(world)
        wanted = rng.choice(["cluster-*/block-000*", "cluster-*/block-002*", "block_finetune-*/block-000*"])
        until(partial(lambda folder, wanted: bool(list(folder.glob(wanted))), ground / name, wanted))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pids[victim], signal.SIGKILL)
        codes = [forks.wait(pid) for pid in pids]
        assert codes[victim] == -signal.SIGKILL and {code for code in codes if code != -signal.SIGKILL} == {1}
        told = "".join((ground / f"{name}-{rank}.log").read_text() for rank in range(world))
        assert told.count("cluscomp: ") == 1 and f"cluscomp: failed: rank {victim} of {world} ended; the same" in told
        for log in ground.glob(f"{name}-*.log"):
            log.unlink()
        other = rng.choice([one for one in (1, 2, 3) if one != world])
        same(record_of(forks, ground, name, start(forks, ground, name, other)), alone)
