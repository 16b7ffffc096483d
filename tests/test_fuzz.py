"""What nobody would write by hand: settings, folders, files and records with anything anywhere.

Each ends with exit code 0 or 2 and one line, within seconds; `pytest --hypothesis-profile=search` looks further.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import composed

from cluscomp import checkpoint
from cluscomp.command.compose import told_in_a_sentence
from cluscomp.command.records import table
from cluscomp.models.quantised import opened
from cluscomp.models.sources import GgufModel, HubModel, TinyModel
from cluscomp.plan.meta import MetaModel
from cluscomp.report import tables  # noqa: F401 (a first import takes long)

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([2**31, 2**63, 10**9, 10**30, -(10**12)]),
    st.floats(), st.sampled_from(["", "x", "nan", "../..", "${seed}", "llama", "float16", "[]", "a\nb", "\x1b[2J"]),
)  # fmt: skip
ANY = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text("ab_", max_size=3), SCALARS, max_size=2)
)
NUMBERS = st.one_of(
    st.integers(-3, 300), st.none(), st.sampled_from(["x", 1.5, True, [], {}, 10**6, 10**9, 2**31 - 1, 2**63])
)


def tries(count: int):
    """So many of a kind in the suite, ten times as many in a search; none may take ten seconds."""
    searching = not settings.default.derandomize
    return settings(
        max_examples=count * (10 if searching else 1), deadline=10_000, suppress_health_check=list(HealthCheck)
    )


def told(work: Callable[[], object]) -> None:
    """Do it; anything but an end without error or the one sentence fails the test."""
    errors, code = io.StringIO(), 0
    try:
        with redirect_stderr(errors), told_in_a_sentence():
            work()
    except SystemExit as end:
        code = end.code
    lines = errors.getvalue().splitlines()
    assert code in (0, 2), errors.getvalue()
    assert code == 0 or (lines[-1].startswith("cluscomp: ") and len(lines[-1]) < 2000)
    assert sum(line.startswith("cluscomp: ") for line in lines) == (code == 2) and "Traceback" not in errors.getvalue()


def places(values, path=()):
    """The path of every node of plain values."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(data, values, anything=ANY):
    """Plain values with one to three nodes that are another, or gone."""
    values = json.loads(json.dumps(values))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from([path for path in places(values) if path]))
        node = values
        for key in parents:
            node = node[key]
        if isinstance(node, dict) and data.draw(st.booleans()) and len(node) > 1:
            del node[last]
        else:
            node[last] = data.draw(anything)
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return TinyModel(architecture="llama", config=SMALL, seed=0).folder(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def copy(model, tmp_path_factory) -> Path:
    return Path(shutil.copytree(model, tmp_path_factory.mktemp("altered") / "model"))


def score(folder: Path) -> None:
    """All that a run does with a folder before it scores it."""
    source = HubModel(id=str(folder), revision=None, config=None)
    MetaModel(source.read_config(folder.parent), torch.float32, "cpu")
    opened(source.folder(folder.parent), torch.float32, torch.device("cpu"), to_score=True).load_all()


@tries(10)
@given(data=st.data())
def test_settings(data):
    keys = st.sampled_from(
        ["bits", "seed", "name", "order", "dtype", "method.floor", "method.vector_dim", "method", "evaluate", "data",
         "evaluate.context", "evaluate.after", "block_finetune.lr", "cluster.samples", "model.architecture", "outputs",
         "model.config", "tracker", "machine", "objective", "data_root", "evaluate.texts", "nothing", "trust"]
    )  # fmt: skip
    given_ = data.draw(st.dictionaries(keys, st.one_of(ANY, st.text(max_size=6)), min_size=1, max_size=3))
    told(lambda: composed("model=tiny", *(f"{key}={value}" for key, value in given_.items())))


@tries(30)
@given(data=st.data())
def test_config_json(data, model, copy):
    values = json.loads((model / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(changed(data, values)))
    told(lambda: score(copy))
    shutil.copy(model / "config.json", copy)


@tries(25)
@given(data=st.data())
def test_headers_of_safetensors(data, model, copy):
    whole = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(changed(data, json.loads(whole[8 : 8 + length]))).encode()
    said = data.draw(st.one_of(st.just(len(header)), st.integers(0, 2**64 - 1), st.integers(0, length)))
    (copy / "model.safetensors").write_bytes(said.to_bytes(8, "little") + header + whole[8 + length :])
    told(lambda: score(copy))
    shutil.copy(model / "model.safetensors", copy)


@pytest.fixture(scope="module")
def compressed(model, tmp_path_factory) -> Path:
    """A checkpoint of ours, with its first config.json beside it."""
    from test_checkpoint import compress

    folder = tmp_path_factory.mktemp("compressed") / "model"
    checkpoint.save(*compress(model, codebook_size=4), folder)
    shutil.copy(folder / "config.json", folder.parent)
    return folder


@tries(20)
@given(data=st.data())
def test_what_config_json_says_of_a_checkpoint(data, compressed):
    path, values = compressed / "config.json", json.loads((compressed.parent / "config.json").read_text())
    values["quantization_config"]["weights"] = changed(data, values["quantization_config"]["weights"], NUMBERS)
    values["quantization_config"].pop("seal", None)
    path.write_text(json.dumps(values))
    checkpoint.seal(compressed)
    told(lambda: score(compressed))


@tries(60)
@given(data=st.data())
def test_heads_of_gguf(data, small_gguf, tmp_path_factory):
    whole, path = small_gguf.read_bytes(), tmp_path_factory.getbasetemp() / "altered.gguf"
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, whole.index(b"token_embd") + 200))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content[: data.draw(st.integers(0, 10**6))])
    source = GgufModel(file=str(path), package=None, of=None, calibration=None)
    told(lambda: MetaModel(source.read_config(path.parent), torch.float32, "cpu"))


@tries(8)
@given(data=st.data())
def test_records(data, tmp_path_factory):
    path = min((ROOT / "results" / "methods").glob("*.json"))
    results = tmp_path_factory.getbasetemp() / "results"
    (results / "fuzz").mkdir(parents=True, exist_ok=True)
    (results / "fuzz" / "record.json").write_text(json.dumps(changed(data, json.loads(path.read_text()))))
    told(lambda: table(["fuzz", f"results={results}"]))
