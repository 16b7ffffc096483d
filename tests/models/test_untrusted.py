"""Models' folders and files made by somebody who means harm, or cut on their way: one sentence each, within seconds."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluscomp.errors import InputError
from cluscomp.models.original import Original
from cluscomp.models.sources import GgufModel, HubModel, TinyModel
from cluscomp.plan.meta import MetaModel

SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
SECONDS = 10  # for one of them, on a busy machine


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return TinyModel(architecture="llama", config=SMALL, seed=0).folder(tmp_path_factory.mktemp("untrusted"))


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def opened(folder: Path) -> None:
    """All that a run does with a folder before it works."""
    source = HubModel(id=str(folder), revision=None, config=None)
    MetaModel(source.read_config(folder.parent), torch.float32, "cpu")
    Original(source.folder(folder.parent), torch.float32, torch.device("cpu")).load_all()


def refused(folder: Path, *named: str, file: str = "config.json") -> None:
    """It takes one sentence with these words, and no time."""
    began = time.monotonic()
    with pytest.raises(InputError) as told:
        opened(folder)
    assert time.monotonic() - began < SECONDS
    for word in (str(folder / file) if file else str(folder), *named):
        assert word in str(told.value), str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "more.safetensors"])
def test_what_is_no_file_is_not_opened(folder, file):
    path = folder / file
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)):
        path.unlink(missing_ok=True)
        make(path)
        refused(folder, file=file)


def test_a_config_that_cannot_be_used_is_named_with_key_and_value(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key, value, *named in [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", -1), ("num_hidden_layers", 0), ("hidden_size", "wide"),
        ("hidden_size", -16), ("hidden_size", 2**63), ("num_attention_heads", 0),
        ("num_attention_heads", 3), ("head_dim", -8), ("head_dim", 10**9), ("intermediate_size", -1),
        ("vocab_size", -1), ("vocab_size", 0), ("hidden_act", "bend"), ("model_type", "lama"), ("model_type", {}),
        ("dtype", "float99"), ("dtype", 1.5), ("pad_token_id", 10**6), ("rms_norm_eps", "small"),
        ("num_key_value_heads", 0), ("text_config", {"n_layer": 10**12}, "n_layer", "1000000000000"),
        ("quantization_config", 3),
    ]:  # fmt: skip
        path.write_text(json.dumps(values | {key: value}))
        refused(folder, *([*named] if named else [key, str(value)]))


@pytest.mark.parametrize("content", [b"[]", b"7", b"{", b"\xff", b"", b"[" * 100_000, b'{"a": ' * 100_000])
def test_a_config_that_is_no_json_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder)


def test_a_count_of_layers_in_settings_is_refused_too(tmp_path):
    values = {"model_type": "llama", "num_hidden_layers": 10**9}
    with pytest.raises(InputError, match=r"model\.config: num_hidden_layers = 1000000000"):
        HubModel(id="org/unheard-of", revision=None, config=values).read_config(tmp_path)
    with pytest.raises(InputError, match=r"model\.config: num_hidden_layers = 1000000000"):
        TinyModel(architecture="llama", config=SMALL | values, seed=0).folder(tmp_path)


def test_tokens_outside_the_vocabulary_are_named_but_for_special_ones(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    for token, number, special in (("far", 257, False), ("<eos>", 300, True)):
        added = {"id": number, "content": token, "special": special, "normalized": False}
        altered = values | {"added_tokens": [*values["added_tokens"], added | dict.fromkeys(
            ("single_word", "lstrip", "rstrip"), False
        )]}  # fmt: skip
        if not special:
            path.write_text(json.dumps(altered))
            refused(folder, repr(token), "257", "vocab_size = 257", file="")
    altered["added_tokens"][-1]["content"] = "<padding>"
    path.write_text(json.dumps(altered))
    opened(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_a_type_that_no_dense_model_has_is_named_with_its_tensor(folder, dtype):
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata={"format": "pt"})
    refused(folder, name, "16 or 32 bit", file="")


def outcome(path: Path) -> str:
    """What is told of a GGUF file, if it is refused; it takes no time, and nothing else is raised."""
    began = time.monotonic()
    source = GgufModel(file=str(path), package=None, of=None, calibration=None)
    try:
        MetaModel(source.read_config(path.parent / "cache"), torch.float32, "cpu")
        return ""
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    finally:
        assert time.monotonic() - began < SECONDS


def test_gguf_files_that_are_cut_or_altered_are_told_in_a_sentence(small_gguf, tmp_path):
    whole, make, path = small_gguf.read_bytes(), random.Random(0), tmp_path / "small.gguf"
    head = whole.index(b"blk.0.ffn_down") + 200  # values and the names of tensors
    told = []
    for number in range(200):
        content = bytearray(whole)
        if number < 50:
            content = content[: make.randrange(len(whole) if number % 2 else head)]
        elif number < 120:
            for _ in range(make.randint(1, 4)):
                content[make.randrange(4, head)] = make.randrange(256)
        elif number < 160:  # a number of 8 bytes, counts among them, that is far too large
            place = make.randrange(4, head)
            content[place : place + 8] = (2 ** make.randint(20, 63)).to_bytes(8, "little")
        else:
            place, length = make.randrange(head), make.randint(1, 40)
            content[place : place + length] = b"" if number % 2 else bytes(length)
        path.write_bytes(content)
        told.append(outcome(path))
    assert all(str(path) in one for one in told if one and "config" not in one)
    assert all(told[:50]) and sum(map(bool, told)) > 120


def test_a_gguf_file_that_lies_is_told(small_gguf, tmp_path):
    whole, path = small_gguf.read_bytes(), tmp_path / "small.gguf"

    def told_of(before: bytes, after: bytes) -> str:
        assert whole.count(before) >= 1
        path.write_bytes(whole.replace(before, after))
        try:
            GgufModel(file=str(path), package=None, of=None, calibration=None).folder(tmp_path / "cache")
        except InputError as error:
            return str(error)
        return ""

    assert "llama.block_count = 4000000000" in told_of(
        b"llama.block_count" + (4).to_bytes(4, "little") + (1).to_bytes(4, "little"),
        b"llama.block_count" + (4).to_bytes(4, "little") + (4 * 10**9).to_bytes(4, "little"),
    )
    assert "missing keys" in told_of(b"blk.0.ffn_up", b"blk.0.ffn_uq")  # else filled with random numbers
    assert not list((tmp_path / "cache").glob("*"))
