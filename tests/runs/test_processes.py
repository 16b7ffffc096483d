"""Real processes on one outputs folder: two at once, a holder that is killed, and kills at random moments.

Processes are forked from one that has imported everything, which saves some seconds each; what they run is the command.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from forks import until
from pipelines import composed

from cluscomp.errors import InputError
from cluscomp.runs.run import run
from cluscomp.store.files import held_alone

BLOCKS = 3
SMALL = [
    "model=tiny", f"model.config.num_hidden_layers={BLOCKS}", "data=text", "method.vector_dim=4",
    "method.codebook_size=256", "method.iterations=200", "evaluate.context=32", "evaluate.limit=2", "evaluate.after=[]",
]  # fmt: skip
STEPS = 8
ORDER = ["cluster", "block_finetune", "recover"]
TUNED = [  # some tenths of a second for each part
    f"order=[{','.join(ORDER)}]", "block_finetune=quick", "block_finetune.length=32", "block_finetune.samples=8",
    "block_finetune.batch_size=4", "block_finetune.epochs=4", f"recover.tokens={32 * 4 * STEPS}", "recover.length=32",
    "recover.batch_size=4", "recover.held_out=4", "recover.save_every=1", "recover.lr=2e-3",
]  # fmt: skip
PARTS = {"cluster": BLOCKS, "block_finetune": BLOCKS, "recover": STEPS}  # after which a killed stage goes on
LAST = {
    "cluster": f"block {BLOCKS}/{BLOCKS}",
    "block_finetune": f"block {BLOCKS}/{BLOCKS}",
    "recover": f"step {STEPS}/{STEPS}",
}
# of the settings that touch what is kept for a killed run
VARIANTS = [
    [],
    [
        "block_finetune.streams=disk", "block_finetune.order=shuffled", "block_finetune.norms=true",
        "method.assign=hessian", "cluster.prefix=compressed", "cluster.samples=4", "cluster.length=32",
        "recover.loss=ce_kl", "recover.norms=true",
    ],
]  # fmt: skip
KILLS = int(os.environ.get("CLUSCOMP_KILLS", "2"))  # of each variant


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> Callable[..., list[str]]:
    """The command's arguments for an outputs folder."""
    ground = tmp_path_factory.mktemp("ground")
    rows = [f"Paragraph {i} says that the quick brown fox jumped over the lazy dog {7 * i} times." for i in range(100)]
    (ground / "text.txt").write_text("\n\n".join(rows))
    shared = [*SMALL, *TUNED, f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}"]
    return lambda outputs, *more: [*shared, f"outputs={outputs}", *more]


def hashes(outputs: Path) -> dict[str, str]:
    """The checkpoint's hash by stage, as the one record says."""
    (record,) = outputs.glob("run-*/record.json")
    return {name: stage["checkpoint_hash"] for name, stage in json.loads(record.read_text())["stages"].items()}


@pytest.fixture(scope="module")
def undisturbed(forks, arguments, tmp_path_factory) -> Callable[..., dict[str, str]]:
    """The hashes of a run from beginning to end."""
    made = {}

    def run(*more: str) -> dict[str, str]:
        if more not in made:
            outputs = tmp_path_factory.mktemp("undisturbed") / "outputs"
            log = outputs.parent / "log"
            assert forks.wait(forks.start(log, *arguments(outputs, *more))) == 0, log.read_text()
            made[more] = hashes(outputs)
        return made[more]

    return run


def test_two_processes_at_once_do_the_work_once(forks, arguments, undisturbed, tmp_path):
    """Scores, too; and a third process meets no lock. The first is held up once, so that the second waits for it."""
    outputs, logs = tmp_path / "outputs", [tmp_path / name for name in ("first", "second", "third")]
    command = arguments(outputs, "evaluate.after=null", f"cache={tmp_path / 'cache'}")
    pids = [forks.start(logs[0], *command)]
    until(lambda: bool(list(outputs.glob("block_finetune-*/streams.json"))))
    os.kill(pids[0], signal.SIGSTOP)
    assert not list(outputs.glob("block_finetune-*/metrics.json")), "too late: the stage had ended"
    pids.append(forks.start(logs[1], *command))
    until(lambda: "waits for process" in logs[1].read_text())
    os.kill(pids[0], signal.SIGCONT)
    assert [forks.wait(pid) for pid in pids] == [0, 0], [log.read_text() for log in logs[:2]]
    assert hashes(outputs) == undisturbed()
    first, second = (log.read_text() for log in logs[:2])
    for name in ORDER:
        assert (first + second).count(f"{name}  {LAST[name]}") == 1
        assert (first + second).count(f"{name}  finished before") == 1
        assert (first + second).count(f"perplexity after {name}: ") == 1
    assert first.count("| original") == second.count("| original") == 1  # both show the whole table
    assert not list(outputs.rglob("lock")) and not list(outputs.rglob(".*"))
    assert forks.wait(forks.start(logs[2], *command)) == 0
    assert "waits" not in logs[2].read_text() and "block 1/" not in logs[2].read_text()


def test_who_waits_takes_over_when_the_holder_is_killed(forks, arguments, undisturbed, tmp_path):
    outputs = tmp_path / "outputs"
    holder = forks.start(tmp_path / "first", *arguments(outputs))
    until(lambda: bool(list(outputs.glob("block_finetune-*/streams.json"))))
    os.kill(holder, signal.SIGSTOP)  # so that it is still at work when the other one comes
    assert not list(outputs.glob("block_finetune-*/metrics.json")), "too late: the stage had ended"
    waiting = forks.start(tmp_path / "second", *arguments(outputs, "name=another"))
    until(lambda: f"block_finetune  waits for process {holder} on " in (tmp_path / "second").read_text())
    forks.kill(holder)
    assert forks.wait(waiting) == 0, (tmp_path / "second").read_text()
    assert "blocks were done before" in (tmp_path / "second").read_text()
    assert hashes(outputs) == undisturbed()


def parts_done(outputs: Path) -> int:
    """Parts of all stages that a run would not do again."""
    done = 0
    for stage, parts in PARTS.items():
        (folder, *_) = [*outputs.glob(f"{stage}-*"), outputs / "none"]
        states = folder.glob("training/attempt-*/checkpoint-*/whole.json")
        steps = max((int(state.parent.name.rpartition("-")[2]) for state in states), default=0)
        done += parts if (folder / "metrics.json").exists() else steps + len(list(folder.glob("block-*")))
    return done


@pytest.mark.slow
@pytest.mark.parametrize("more", VARIANTS, ids=["plain", "all"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(forks, arguments, undisturbed, tmp_path, more):
    """Each kill comes within a block's time (some 0.03 seconds) after some part is done or the work began.

    The parts are drawn one from each of as many ranges; on a busy machine the process is further by the time it dies,
    and may have ended by itself.
    """
    outputs, log, rng = tmp_path / "outputs", tmp_path / "log", random.Random(str(more))
    places, deaths, total = set(), set(), sum(PARTS.values()) - 1
    for kill in range(KILLS):
        target = int((kill + rng.random()) * total / KILLS)
        pid = forks.start(log, *arguments(outputs, *more))
        until(lambda: any(outputs.glob("*/lock")) or any(outputs.glob("run-*/record.json")))
        until(partial(lambda least: parts_done(outputs) >= least, target))
        time.sleep(rng.uniform(0, rng.choice([0.005, 0.02, 0.05])))
        os.kill(pid, signal.SIGKILL)
        deaths.add(forks.wait(pid))
        places.add(parts_done(outputs))
    assert len(places) > 1 and -signal.SIGKILL in deaths and deaths <= {-signal.SIGKILL, 0}, log.read_text()
    assert forks.wait(forks.start(log, *arguments(outputs, *more))) == 0, log.read_text()
    assert hashes(outputs) == undisturbed(*more)
    assert not [
        path for path in outputs.rglob("*") if path.suffix == ".stream" or path.name.startswith((".", "block-"))
    ]


def test_ctrl_c_five_times_while_another_process_holds_a_lock_is_one_line(arguments, tmp_path, forks):
    cache, log = tmp_path / "cache", tmp_path / "log"
    with held_alone(cache, "test"):
        pid = forks.start(log, *arguments(tmp_path / "outputs"), f"cache={cache}")
        until(lambda: "waits for process" in log.read_text())
        for _ in range(5):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.01)
        assert forks.wait(pid) == 130
    told = log.read_text()
    assert "Traceback" not in told and told.count("cluscomp: interrupted") == told.count("interrupted") == 1


def test_a_process_without_its_group_is_told(arguments, tmp_path, monkeypatch):
    experiment = composed(*arguments(tmp_path / "outputs"))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="RANK=1 without a WORLD_SIZE"):
        run(experiment)
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match=r"ranks=2: there are 1 processes here.*torchrun --nproc_per_node 2"):
        run(replace(experiment, ranks=2))
