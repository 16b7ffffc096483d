"""Sweeps as jobs: local processes by submitit, and a real Slurm, jobs of which are taken from their machine midway.

`tests/slurm/start.sh` brings Slurm up on a single machine; where none answers that test is skipped.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORK = [  # some seconds for each block, so that there is a middle
    "model=tiny", "model.config.num_hidden_layers=6", "data=text", "method=cluscomp_data_free", "method.vector_dim=4",
    "method.codebook_size=256", "evaluate.context=32", "evaluate.after=[]", "name=cells", "device=cpu",
]  # fmt: skip
CELLS = ["method.iterations=500,600", "seed=0,1"]
SLURM = [
    "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=1", "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1", "hydra.launcher.array_parallelism=2", "hydra.launcher.timeout_min=10",
]  # fmt: skip


def slurm_answers() -> bool:
    return shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


def arguments(outputs: Path, *more: str) -> list[str]:
    text = outputs.parent / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says that foxes jumped {7 * i} times." for i in range(60)))
    places = [f"data.file={text}", f"outputs={outputs}", f"cache={outputs.parent / 'cache'}"]
    return ["-m", *WORK, *places, *more]


def command(outputs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "cluscomp", *arguments(outputs, *more)]


def found(outputs: Path) -> dict[str, str]:
    """The checkpoint's hash of each finished run by its key."""
    records = [json.loads(path.read_text()) for path in outputs.glob("run-*/record.json")]
    return {record["run"]["key"]: record["stages"]["cluster"]["checkpoint_hash"] for record in records}


@pytest.mark.slow
def test_cells_may_be_processes_of_this_machine(forks, tmp_path):
    """Their own are started anew, as submitit does."""
    outputs = tmp_path / "outputs"
    small = ["model.config.num_hidden_layers=1", "method.iterations=2"]
    done = forks.run(*arguments(outputs, *small, "seed=0,1", "hydra/launcher=slurm_local"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(found(outputs)) == 2 and done.stdout.count("finished") == 2


@pytest.mark.slow
@pytest.mark.skipif(not slurm_answers(), reason="no Slurm answers here: tests/slurm/start.sh starts one")
def test_a_job_taken_from_its_machine_is_queued_again_and_goes_on_where_it_stopped(tmp_path):
    outputs = tmp_path / "outputs"
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(command(outputs, *CELLS, *SLURM), stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
        told = lambda: (tmp_path / "log").read_text()  # noqa: E731
        begun: list[Path] = []
        while not begun:
            assert sweep.poll() is None, told()
            time.sleep(0.2)
            begun = [path for path in outputs.glob("cells/cells/*/log.txt") if "block 2/6" in path.read_text()]
        jobs = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%A"], capture_output=True, text=True, check=True)
        for job in jobs.stdout.split():
            subprocess.run(["scancel", "--signal=USR2", job])  # one may have ended by itself
        assert sweep.wait(timeout=600) == 0, told()
    assert begun[0].read_text().count("block 1/6") >= 2
    listed = subprocess.run(
        [sys.executable, "-m", "cluscomp", "status", "cells", f"outputs={outputs}"], capture_output=True, text=True
    )
    assert listed.returncode == 0 and listed.stdout.count("finished") == 4
    quiet = tmp_path / "quiet"
    subprocess.run(command(quiet, *CELLS), check=True, capture_output=True, cwd=tmp_path)
    assert len(found(outputs)) == 4 and found(outputs) == found(quiet)
