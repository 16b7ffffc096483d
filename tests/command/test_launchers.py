"""Sweeps with Ray on this machine, and searches by Optuna: real ones, where the packages are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluscomp.store.records import SCHEMA, Record, Score, objective, protocol

SETTINGS = [
    "-m", "model=tiny", "data=text", "method=cluscomp_data_free", "method.vector_dim=4", "method.iterations=2",
    "evaluate.context=32", "evaluate.limit=2", "device=cpu", "name=cells",
]  # fmt: skip


def sweep(place: Path, *more: str) -> subprocess.CompletedProcess[str]:
    text = place / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says that foxes jumped {7 * i} times." for i in range(60)))
    places = [f"data.file={text}", f"outputs={place / 'outputs'}", f"cache={place / 'cache'}"]
    command = [sys.executable, "-m", "cluscomp", *SETTINGS, *places, *more]
    alone = {"RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=os.environ | alone)


def records(place: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(place.glob("outputs/run-*/record.json"))]


@pytest.mark.slow
def test_cells_may_be_tasks_of_ray(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="Ray is not installed: pip install 'cluscomp[ray]'")
    small = ["hydra.launcher.ray.init.num_cpus=2", "hydra.launcher.ray.init.object_store_memory=78643200"]
    done = sweep(tmp_path, "method.codebook_size=8,16", "hydra/launcher=ray", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = [record["config"]["stages"]["cluster"]["method"]["codebook_size"] for record in records(tmp_path)]
    assert sorted(sizes) == [8, 16]
    cells = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/cells/cells/*/cell.json")]
    assert [cell["state"] for cell in cells] == ["finished"] * 2
    assert len({cell["place"] for cell in cells} - {f"process {os.getpid()}"}) == 2  # each in a process of its own


@pytest.mark.slow
def test_a_search_finds_the_cell_with_the_best_score(tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="Optuna is not installed: pip install 'cluscomp[search]'"
    )
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=minimize",
    ]
    done = sweep(tmp_path, *search, "method.codebook_size=choice(2,64)", "hydra.sweeper.sampler.seed=0")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for record in records(tmp_path):
        perplexity = [row["value"] for row in record["scores"] if row["metric"] == "perplexity"][-1]
        found[record["config"]["stages"]["cluster"]["method"]["codebook_size"]] = perplexity
    best = (tmp_path / "outputs" / "optimization_results.yaml").read_text()
    assert f"best_value: {min(found.values())}" in best
    assert f"method.codebook_size: {min(found, key=found.__getitem__)}" in best


def test_the_objective_is_the_mean_over_texts_after_the_last_stage():
    def score(after: str, metric: str, dataset: str, value: float) -> Score:
        rules = protocol(context=8)
        return Score(after=after, metric=metric, dataset=dataset, value=value, stderr=None, n=1, protocol=rules)

    scores = [
        score("original", "perplexity", "a", 1.0), score("cluster", "perplexity", "a", 4.0),
        score("cluster", "perplexity", "b", 8.0), score("cluster", "kl", "a", 0.5),
    ]  # fmt: skip
    record = Record(schema=SCHEMA, run={}, config={}, choices={}, scores=scores, size={}, machine={}, stages={})
    assert objective(record, "perplexity") == 6.0 and objective(record, "kl") == 0.5
    assert objective(record, "accuracy") is None
