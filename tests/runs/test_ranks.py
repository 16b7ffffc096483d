"""Several processes at one run, ranks, forked and started as torchrun does: what they make is what one makes."""

import json
import os
import random
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import until
from pipelines import composed
from safetensors.torch import load_file

from cluscomp.runs.cells import at_work, folder_of, read_cell
from cluscomp.runs.experiment import settings_of

BLOCKS, ORDER = 3, ["cluster", "block_finetune", "recover"]
SMALL = [
    "model=tiny", f"model.config.num_hidden_layers={BLOCKS}", "data=text", f"order=[{','.join(ORDER)}]", "device=cpu",
    "method.vector_dim=4", "method.codebook_size=64", "method.iterations=50", "method.assign=hessian",
    "cluster.samples=4", "cluster.length=32", "cluster.batch_size=2", "block_finetune=quick",
    "block_finetune.length=32", "block_finetune.samples=7", "block_finetune.batch_size=6", "block_finetune.held_out=2",
    "block_finetune.epochs=2", "recover=quick", "recover.tokens=1536", "recover.length=32", "recover.batch_size=6",
    "recover.held_out=4", "recover.save_every=2",
    "evaluate.context=32", "evaluate.limit=5", "evaluate.batch_size=2", "evaluate.distance=true", "dtype=float32",
]  # fmt: skip
KILLS = int(os.environ.get("CLUSCOMP_KILLS", "1"))


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    rows = [f"Paragraph {i} says that the quick brown fox jumped over the lazy dog {7 * i} times." for i in range(100)]
    (folder / "text.txt").write_text("\n\n".join(rows))
    return folder


def start(
    forks, ground: Path, name: str, world: int, *more: str, script: str = "", small: list[str] = SMALL
) -> list[int]:
    """The processes of a run whose outputs are in a folder of this name, with a log for each; or of a script."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = []
    for rank in range(world):
        variables = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} if world > 1 else {}
        command = [*small, f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", f"outputs={ground / name}"]
        arguments = more if script and not small else (*command, *more)
        log = ground / f"{name}-{rank}.log"
        found.append(forks.start(log, *arguments, variables=variables, script=script))
    return found


def record_of(forks, ground: Path, name: str, pids: list[int]) -> dict:
    logs = [ground / f"{name}-{rank}.log" for rank in range(len(pids))]
    assert [forks.wait(pid) for pid in pids] == [0] * len(pids), [log.read_text()[-2000:] for log in logs]
    assert "| original" in logs[0].read_text() and not any(log.read_text() for log in logs[1:])
    (path,) = (ground / name).glob("run-*/record.json")
    return json.loads(path.read_text())


def same(one: dict, other: dict) -> None:
    """What was learned, bit for bit, and all scores."""
    assert one["run"]["key"] == other["run"]["key"] and [*one["stages"]] == ORDER
    for first, second in zip(one["stages"].values(), other["stages"].values(), strict=True):
        assert first["checkpoint_hash"] == second["checkpoint_hash"] and first["found"] == second["found"]
    assert one["scores"] == other["scores"] and len(one["scores"]) > 8


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


CHAIN = """
import time
import torch
from cluscomp import ranks

with ranks.joined("cpu"):
    chain, stream = ranks.Chain(), [torch.full((2, 3), 10.0 * number, dtype=torch.bfloat16) for number in range(4)]
    for number in filter(ranks.mine, range(8)):
        entering, stream = chain.taken(stream) if number else stream, []
        for one in entering:
            made = (one.float() + 1).t().contiguous().t() if number > 2 else one + 1  # another type, another layout
            stream.append(made)
            if number < 7:
                chain.give(made)
        assert torch.equal(entering[-1], entering[3]) and len(entering) == 4
        time.sleep(0.2 * (ranks.rank() == 1))  # what comes meanwhile waits for this rank
    if ranks.mine(7):
        print([str(stream[0].dtype), *[float(one.unique()) for one in stream]])
"""


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_is_handed_on_arrives_as_it_was_made(forks, ground, world):
    name = f"chain-{world}"
    pids = start(forks, ground, name, world, script=CHAIN, small=[])
    logs = [ground / f"{name}-{rank}.log" for rank in range(world)]
    assert [forks.wait(pid) for pid in pids] == [0] * world, [log.read_text()[-2000:] for log in logs]
    assert "".join(log.read_text() for log in logs) == "['torch.float32', 8.0, 18.0, 28.0, 38.0]\n"


STRANGER = """
import socket
from cluscomp import ranks

connect = socket.create_connection

def after_a_stranger(place):
    connect(place).close()
    return connect(place)

socket.create_connection = after_a_stranger
with ranks.joined("cpu"):
    assert ranks.gathered(ranks.rank()) == [0, 1]
"""


def test_who_else_connects_is_no_rank(forks, ground):
    """A scan of open ports, say, which says nothing and leaves."""
    pids = start(forks, ground, "stranger", 2, script=STRANGER, small=[])
    assert [forks.wait(pid) for pid in pids] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_all_stop_say_why_once(forks, ground, world):
    """Ctrl-C reaches all of them at once, and so does an error that all meet: the first alone says it, always."""
    name = f"pressed-{world}"
    pids = start(forks, ground, name, world, "block_finetune.epochs=100000")
    until(lambda: bool(list((ground / name).glob("block_finetune-*/lock"))))
    time.sleep(0.5)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert [forks.wait(pid) for pid in pids] == [130] + [1] * (world - 1)
    told = [(ground / f"{name}-{rank}.log").read_text() for rank in range(world)]
    assert told[0].splitlines()[-1].startswith("cluscomp: interrupted") and "cluscomp: " not in "".join(told[1:])


WAITING = """
import time
from cluscomp.process import interrupt_once
from cluscomp.ranks import joined, rank, wait

interrupt_once()
with joined("cpu"):
    wait()
    print("here", flush=True)
    wait() if rank() == 0 else time.sleep(600)
"""


def test_the_first_rank_says_so_while_it_waits_for_the_others(forks, ground):
    """It waits in compiled code, where Python cannot act on Ctrl-C."""
    pids = start(forks, ground, "waiting", 2, script=WAITING, small=[])
    logs = [ground / f"waiting-{rank}.log" for rank in range(2)]
    until(lambda: all(log.is_file() and "here" in log.read_text() for log in logs))
    time.sleep(1)  # from there it is a few steps of Python to the compiled code
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert [forks.wait(pid) for pid in pids] == [130, 1]
    assert logs[0].read_text().splitlines()[-1].startswith("cluscomp: interrupted")
    assert "KeyboardInterrupt" not in logs[1].read_text()


UNLIKE = """
import sys
from cluscomp.__main__ import main
from cluscomp.process import rank

sys.argv.append(f"seed={rank()}")
main()
"""


def test_processes_with_unlike_settings_are_no_run(forks, ground):
    """They would answer one another in different stages."""
    pids = start(forks, ground, "unlike", 2, script=UNLIKE)
    assert [forks.wait(pid) for pid in pids] == [2, 1]
    assert "cluscomp: the processes of this run have unlike settings" in (ground / "unlike-0.log").read_text()
    assert not list((ground / "unlike").glob("cluster-*"))


LATE = """
import sys
import time
from functools import partial
from pathlib import Path
from cluscomp.command.compose import compose_for
from cluscomp.command.sweep import Started, _run_or_put_aside
from cluscomp.process import rank

cell = Path(sys.argv.pop())
while rank() == 1 and "running" not in (cell / "cell.json").read_text():
    time.sleep(0.01)
compose_for(partial(_run_or_put_aside, aside=set(), started=Started({}, 0.0, frozenset({cell.name}))))
"""


def test_a_rank_that_comes_late_works_at_the_cell_that_is_tried_again(forks, ground):
    """The tasks of a job with retry=true, the first of which already says of the cell that it is running."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    settings = [*SMALL, f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}", f"outputs={ground / 'late'}"]
    settings += ["order=[cluster]", "evaluate.after=[]", "retry=true", "hydra/launcher=slurm_local"]
    folder = folder_of(ground / "late", "run", settings_of(composed(*settings[:-1])))
    with pytest.raises(ValueError, match="as before"), at_work(folder, [], lambda error: (str(error), 1)):
        raise ValueError("as before")
    pids = start(forks, ground, "late", 2, *settings, str(folder), script=LATE, small=[])
    assert [forks.wait(pid) for pid in pids] == [0, 0], [(ground / f"late-{n}.log").read_text() for n in range(2)]
    assert read_cell(folder).state == "finished"


FAILING = """
import time
from cluscomp.ranks import joined, rank, wait

try:
    with joined("cpu"):
        if rank() == 1:
            raise ValueError
        wait()
except ValueError:
    time.sleep(1)  # a tracker may need as long to end
    print("said by rank 1", flush=True)
    raise
"""


def test_an_error_of_one_rank_is_said_by_it(forks, ground):
    pids = start(forks, ground, "one", 2, script=FAILING, small=[])
    assert [forks.wait(pid) for pid in pids] == [1, 1]
    told = [(ground / f"one-{rank}.log").read_text() for rank in range(2)]
    assert told[0] == "" and told[1].startswith("said by rank 1")


TUNED = [
    "model=tiny", "+model.config.attention_dropout=0.2", "data=text", "device=cpu", "order=[cluster,finetune]",
    "method.vector_dim=4", "method.codebook_size=64", "finetune=lora", "finetune.norms=true", "finetune.length=64",
    "finetune.epochs=2", "finetune.held_out=4", "finetune.batch_size=6", "finetune.lr=3e-3",
    "instructions=prompt_completion", "evaluate.after=[]", "evaluate.context=32", "dtype=float32",
]  # fmt: skip


@pytest.mark.slow
def test_ranks_learn_a_task_as_one_process_does(forks, ground):
    """From examples of unlike lengths and with dropout, to the bit."""
    rows = [{"prompt": f"{'Say ' * (i % 7)}{i}", "completion": f" is {i * i}"} for i in range(40)]
    (ground / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for world in (1, 2, 3):
        name, file = f"task-{world}", f"instructions.file={ground / 'task.jsonl'}"
        pids = start(forks, ground, name, world, file, small=TUNED)
        logs = [ground / f"{name}-{rank}.log" for rank in range(world)]
        assert [forks.wait(pid) for pid in pids] == [0] * world, [log.read_text()[-2000:] for log in logs]
        (path,) = (ground / name).glob("finetune-*/metrics.json")
        found.append(json.loads(path.read_text()))
    assert found[0]["checkpoint_hash"] == found[1]["checkpoint_hash"] == found[2]["checkpoint_hash"]
    assert found[0]["found"] == found[1]["found"] == found[2]["found"]
    assert found[0]["found"]["kept"] and found[0]["found"]["steps"] == 6


WITHOUT_GRADIENT = {
    "qwen3_moe": {  # experts that get no token
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2,
        "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 1,
    },
    "bart": {  # attention to an encoder, of which there is none
        "d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "num_hidden_layers": 2, "is_decoder": True, "is_encoder_decoder": False,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_ranks_train_models_of_which_a_part_gets_no_gradient(forks, ground, families, name):
    folder = families(name, **WITHOUT_GRADIENT[name])
    trained = [
        "model=hub", f"model.id={folder}", "data=text", "device=cpu", "order=[prepare]", "prepare=quick",
        "prepare.tokens=384", "prepare.length=12", "prepare.batch_size=2", "prepare.held_out=4", "evaluate.after=[]",
        "prepare.vector_dim=4", "prepare.codebook_size=8", "evaluate.context=12", "dtype=float32",
    ]  # fmt: skip
    pids = start(forks, ground, name, 2, small=trained)
    logs = [ground / f"{name}-{rank}.log" for rank in range(2)]
    assert [forks.wait(pid) for pid in pids] == [0, 0], [log.read_text()[-2000:] for log in logs]
    (path,) = (ground / name).glob("prepare-*/metrics.json")
    assert json.loads(path.read_text())["found"]["kept"]


# behind a compressed prefix

BEHIND = [
    "model=tiny", f"model.config.num_hidden_layers={BLOCKS}", "data=text", "device=cpu", "order=[cluster]",
    "method=gptq", "bits=3", "cluster=corrected", "cluster.samples=4", "cluster.length=32", "cluster.batch_size=2",
    "evaluate.after=[]", "evaluate.context=32", "dtype=float32",
]  # fmt: skip
COUNTED = """
from cluscomp.__main__ import main
from cluscomp.methods.gptq import Gptq

made, compress = [], Gptq.compress

def counting(self, layers):
    made.extend(name for name, layer in layers.items() if not layer.weight_OI.is_meta)
    yield from compress(self, layers)

Gptq.compress = counting
try:
    main()
finally:
    print("made", len(made))
"""


@pytest.mark.slow
def test_ranks_share_a_blocks_layers_out_behind_a_compressed_prefix(forks, ground):
    hashes, made = [], []
    for world in (1, 2):
        name = f"behind-{world}"
        pids = start(forks, ground, name, world, script=COUNTED, small=BEHIND)
        logs = [ground / f"{name}-{rank}.log" for rank in range(world)]
        assert [forks.wait(pid) for pid in pids] == [0] * world, [log.read_text()[-2000:] for log in logs]
        made.append([int(log.read_text().rpartition("made ")[2]) for log in logs])
        (path,) = (ground / name).glob("cluster-*/metrics.json")
        hashes.append(json.loads(path.read_text())["checkpoint_hash"])
    assert hashes[0] == hashes[1]
    assert made == [[7 * BLOCKS], [5 * BLOCKS, 2 * BLOCKS]]  # q and v of q, k, v; o; gate of gate, up; down


WALKED = """
from cluscomp.__main__ import main
from cluscomp.models.walk import Walk
from cluscomp.stages.blockwise import Blockwise

walked, observe, finish = [], Walk.observe, Blockwise.finish

def counting(self, index, block, hidden_BTH, layers):
    if not hidden_BTH.is_meta:  # no plan
        walked.append(index)
    return observe(self, index, block, hidden_BTH, layers)

def stopping(self, index, *others, **numbers):
    finish(self, index, *others, **numbers)
    if index == STOP:
        raise SystemExit(7)

Walk.observe, Blockwise.finish = counting, stopping
try:
    main()
finally:
    print("walked", walked)
"""
ONCE = [one for one in SMALL if not one.startswith(("order=", "method.", "cluster.batch", "evaluate.limit"))]
ONCE += ["order=[cluster]", "evaluate.after=[]", "cluster.batch_size=4"]  # all windows in one batch
EACH = ["bits=3", "method.iterations=20"]
ACROSS = ["bits=2.5", "allocation=model", "method.iterations=20"]


@pytest.mark.slow
@pytest.mark.parametrize(("more", "passes"), [(EACH, 1), (ACROSS, 2)], ids=["each", "model"])
def test_one_rank_walks_through_a_block_of_the_original(forks, ground, more, passes):
    """Also where bits are shared out first, and where some blocks were made before."""
    made = {}

    def walked(world: int, name: str, stop: int = -1) -> list[list[int]]:
        pids = start(forks, ground, name, world, *more, script=WALKED.replace("STOP", str(stop)), small=ONCE)
        logs = [ground / f"{name}-{rank}.log" for rank in range(world)]
        assert {forks.wait(pid) for pid in pids} == {0 if stop < 0 else 7}, [log.read_text()[-2000:] for log in logs]
        for path in (ground / name).glob("cluster-*/metrics.json"):
            made[name] = json.loads(path.read_text())["checkpoint_hash"]
        return [json.loads(log.read_text().rpartition("walked ")[2]) for log in logs]

    for world in (1, 2, 3):
        found = walked(world, f"walked-{world}-{passes}")
        assert found == [[*range(rank, BLOCKS, world)] * passes for rank in range(world)]
    stopped = f"walked-on-{passes}"
    assert walked(1, stopped, stop=1) == [[*range(BLOCKS)] * (passes - 1) + [0, 1]]
    (first,) = (ground / stopped).glob("cluster-*/block-000*")
    first.unlink()  # the second one has been made, the others have not
    (ground / f"{stopped}-0.log").unlink()
    assert walked(2, stopped) == [[0, 2], [1]]
    assert len(made) == 4 and len(set(made.values())) == 1


# held in parts

IN_PARTS = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from cluscomp import checkpoint, ranks
from cluscomp.models.opened import Opened
from cluscomp.train.sharding import sharded

folder, cpu, ids_BT = Path(sys.argv[1]), torch.device("cpu"), torch.arange(1, 25).view(2, 12)
whole = checkpoint.load(folder, torch.float32, cpu)
with ranks.joined("cpu"):
    opened = Opened(folder, torch.float32, cpu)
    model = opened.model()
    with sharded(model, opened), torch.no_grad():
        same = torch.equal(model(ids_BT).logits, whole(ids_BT).logits)
        codes = {name: one for name, one in model.named_parameters() if isinstance(one, DTensor)}
        own = {name.replace("parametrizations.", "").removesuffix(".original"): one.to_local().numel()
               for name, one in codes.items()}
    state = model.state_dict()
    again = ranks.rank() > 0 or all(torch.equal(state[name], one) for name, one in whole.state_dict().items())
print(json.dumps([same, own, again]))
"""


@pytest.mark.slow
def test_each_of_two_ranks_holds_half_of_the_codes(forks, ground, alone):
    """And the model computes to the bit as when it is whole; in the end the first rank has all again."""
    (folder,) = (ground / "alone").glob("cluster-*/checkpoint")
    pids = start(forks, ground, "parts", 2, str(folder), script=IN_PARTS, small=[])
    logs = [ground / f"parts-{rank}.log" for rank in range(2)]
    assert [forks.wait(pid) for pid in pids] == [0, 0], [log.read_text()[-2000:] for log in logs]
    (same, first, again), (also, second, _) = (json.loads(log.read_text().splitlines()[-1]) for log in logs)
    assert same and also and again
    stored = load_file(folder / "model.safetensors")
    large = {name: one.numel() for name, one in stored.items() if one.dtype == torch.uint8 and one.numel() >= 1024}
    assert len(large) == 3 * BLOCKS  # of a block's MLP; those of attention are small here
    assert {name: first[name] + second[name] for name in first} == large
    assert all(first[name] - second[name] in (0, 1) for name in large)


@pytest.mark.slow
def test_ranks_that_share_the_codes_learn_what_one_process_learns(forks, ground, alone):
    """Also where they are killed and one process that holds all goes on; before, each reads block after block."""
    for name in ("sharded", "stopped"):
        shutil.copytree(ground / "alone", ground / name, ignore=shutil.ignore_patterns("run-*", "recover-*", "cells"))
    same(record_of(forks, ground, "sharded", start(forks, ground, "sharded", 2, "shard=true")), alone)
    pids = start(forks, ground, "stopped", 2, "shard=true")
    until(lambda: bool(list((ground / "stopped").glob("recover-*/training/attempt-0/checkpoint-4/whole.json"))))
    os.kill(pids[0], signal.SIGKILL)
    assert [forks.wait(pid) for pid in pids] == [-signal.SIGKILL, 1]
    for log in ground.glob("stopped-*.log"):
        log.unlink()
    same(record_of(forks, ground, "stopped", start(forks, ground, "stopped", 1)), alone)
    assert "goes on after step" in (ground / "stopped-0.log").read_text()
