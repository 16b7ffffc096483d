"""Saved models against the models in memory and against dense models, for every family; and what is refused."""

import json
import os
import pickle
import shutil

import pytest
import torch
from reference.recipe import NO_DATA, PAPER, STORED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.forms.head import Head
from cluscomp.forms.layers import size_of
from cluscomp.forms.linear import CompressedLinear, compressed
from cluscomp.kernels.loading import native
from cluscomp.methods.cluscomp import ClusComp
from cluscomp.models.opened import Opened
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.stages.clustering import compress_block
from cluscomp.stages.parts import put_part, read_part, save_part
from cluscomp.store.files import file_hash
from cluscomp.store.tensor_files import tensor_bytes, weight_bytes


def compress(folder, codebook_size=7, share="none"):
    """A model with every linear layer compressed, and its tokenizer."""
    original = Original(folder, torch.float32, torch.device("cpu"))
    model = original.load_all()
    stored = STORED | {"share": share}
    method = ClusComp(bits=None, vector_dim=2, codebook_size=codebook_size, iterations=2, **PAPER, **stored, **NO_DATA)
    for name, block in zip(block_names(model), blocks(model)):
        compress_block(method, block, name, seed=0, statistics={})
    return model, original.tokenizer


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """Of each family in turn: the model in memory, the folder it was saved to (read it only), the original's folder."""
    model, tokenizer = compress(family, codebook_size=8)
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(model, tokenizer, folder)
    return model, folder, family


@pytest.fixture(scope="module")
def tiny_saved(tiny_folder, tmp_path_factory):
    model, tokenizer = compress(tiny_folder)
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    checkpoint.save(model, tokenizer, folder)
    return model, folder


@pytest.fixture
def copy(tiny_saved, tmp_path):
    """A copy of the tiny checkpoint that may be damaged."""
    return shutil.copytree(tiny_saved[1], tmp_path / "copy")


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model.eval()(ids, **kwargs).logits


def test_plain_transformers_gives_the_same_logits(saved, ids):
    model, folder, _ = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert len(compressed(again)) == len(compressed(model)) > 0
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(logits(checkpoint.load(folder), ids), logits(model, ids))


def dense_twin(model, original_folder, dtype):
    """The original with its linear weights replaced by the rebuilt ones: what the compressed model has to compute."""
    dense = AutoModelForCausalLM.from_pretrained(original_folder, dtype=dtype)
    for name, layer in compressed(model).items():
        dense.get_submodule(name).weight.data = layer.stored(torch.float32).detach().to(dtype).contiguous()
    return dense


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_a_dense_model_with_these_weights_computes_the_same(saved, ids, dtype, tolerance):
    """Catches a lost bias, a transposed weight, an embedding or norm that was rounded."""
    model, folder, original_folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype
    expected = logits(dense_twin(model, original_folder, dtype), ids).float()
    assert (logits(loaded, ids).float() - expected).norm() <= tolerance * expected.norm()


def test_biases_are_kept(families, tmp_path):
    for name in ("opt", "phi"):
        model, tokenizer = compress(families(name))
        checkpoint.save(model, tokenizer, tmp_path / name)
        original = load_file(families(name) / "model.safetensors")
        biases = {key: value for key, value in original.items() if key.endswith("bias")}
        parameters = dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        layers = [f"{layer}.bias" for layer in compressed(model)]
        assert layers and all(torch.equal(parameters[key], biases[key]) and biases[key].any() for key in layers)


def test_saving_again_and_sharding_change_nothing(saved, ids, tmp_path):
    model, folder, _ = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ids), logits(model, ids))


def test_a_loaded_model_saves_to_the_same_bytes(tiny_saved, tmp_path):
    folder = tiny_saved[1]
    checkpoint.save(checkpoint.load(folder), AutoTokenizer.from_pretrained(folder), tmp_path / "again")
    assert checkpoint.checkpoint_hash(tmp_path / "again") == checkpoint.checkpoint_hash(folder)


def test_the_config_may_name_another_dtype_than_the_one_measured(tiny_saved, ids, tmp_path):
    """That of the original: on a CPU a model in bfloat16 is measured in float32."""
    model, folder = tiny_saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    checkpoint.save(model, tokenizer, tmp_path / "other", torch.bfloat16, "# A card, in any letters: é\n")
    assert checkpoint.load(tmp_path / "other").dtype == torch.bfloat16 and model.dtype == torch.float32
    assert torch.equal(logits(checkpoint.load(tmp_path / "other", torch.float32), ids), logits(model, ids))
    assert checkpoint.checkpoint_hash(tmp_path / "other") == checkpoint.checkpoint_hash(folder)
    assert (tmp_path / "other" / "README.md").read_text(encoding="utf-8") == "# A card, in any letters: é\n"
    assert "README.md" in checkpoint.verify(tmp_path / "other")


def test_generation_is_greedy_search_by_hand(tiny_saved, ids):
    model, folder = tiny_saved
    loaded = checkpoint.load(folder)
    sequence = ids[:1]
    for _ in range(6):
        sequence = torch.cat([sequence, logits(model, sequence)[:, -1].argmax(1, keepdim=True)], 1)
    made = loaded.generate(ids[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(made, sequence)


def test_a_loaded_checkpoint_has_a_head_that_reads_16_bits_tied_or_not(saved, ids):
    _, folder, _ = saved
    loaded = checkpoint.load(folder, torch.float32)
    layer = loaded.get_output_embeddings()
    assert type(layer) is Head
    embeddings = loaded.get_input_embeddings().weight
    assert (layer.weight is embeddings) == bool(loaded.config.get_text_config().tie_word_embeddings)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
        few = loaded(input_ids=ids[:1, :4]).logits
        assert (layer._halves is not None) == (native is not None)
        layer.__class__ = torch.nn.Linear
        torch.testing.assert_close(few, loaded(input_ids=ids[:1, :4]).logits, rtol=1e-4, atol=1e-4)


def test_padding_and_masks(saved, ids):
    model, folder, _ = saved
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    loaded = checkpoint.load(folder)
    batch = logits(loaded, ids, attention_mask=mask)
    assert torch.equal(batch, logits(model, ids, attention_mask=mask))
    torch.testing.assert_close(batch[1, :-4], logits(model, ids[1:, :-4])[0], rtol=1e-4, atol=1e-4)


def test_each_stored_tensor_takes_the_bits_of_the_ledger(saved):
    model, folder, _ = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, layer in compressed(model).items():
        ledger = layer.stored.ledger()
        codes, codebooks = tensors[f"{name}.stored.codes"], tensors[f"{name}.stored.codebooks"]
        assert codes.dtype == torch.uint8 and codebooks.dtype == torch.float16
        assert codes.numel() * 8 == ledger["codes"] + ledger["padding"]
        assert codebooks.numel() * 16 == ledger["codebooks"]
        sub_vectors = layer.in_features * -(-layer.out_features // 2)
        assert ledger["codes"] == 3 * sub_vectors  # 8 centroids
        assert tensors.get(f"{name}.weight", torch.empty(0)).numel() == 0
    size = (folder / "model.safetensors").stat().st_size
    raw = (folder / "model.safetensors").read_bytes()[:8]
    header = 8 + int.from_bytes(raw, "little")
    assert size - header == pytest.approx(sum(size_of(model).ledger.values()) / 8, rel=1e-3)
    assert size == weight_bytes(folder)


def test_a_transformers_without_cluscomp_fails_loudly(tiny_saved, without_ours):
    """In a process that never imports cluscomp: no model with random weights may come back."""
    program = """
import sys
from transformers import AutoModelForCausalLM
assert "cluscomp" not in sys.modules
print("begun")
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("loaded")
"""
    run = without_ours.run(str(tiny_saved[1]), script=program)
    assert run.returncode != 0 and run.stdout == "begun\n"
    assert "Error" in run.stderr


def resign(folder):
    """Renew the hashes, as if the damage had been there when the folder was written."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["sha256"] = {name: file_hash(folder / name) for name in manifest["sha256"]}
    path.write_text(json.dumps(manifest))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    resign(folder)


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["seal"]  # as of one written before there were seals
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    resign(folder)


LAYER = "model.layers.1.mlp.up_proj"


def test_an_altered_byte_is_refused(copy):
    path = copy / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"model\.safetensors: missing or altered"):
        checkpoint.load(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        checkpoint.load(copy)


@pytest.mark.parametrize("part", [".stored.codes", ".stored.codebooks"])
def test_a_missing_tensor_is_refused(copy, part):
    edit_tensors(copy, lambda tensors: tensors.pop(LAYER + part))
    with pytest.raises(InputError, match=LAYER):
        checkpoint.load(copy)


def test_an_unexpected_tensor_is_refused(copy):
    edit_tensors(copy, lambda tensors: tensors.update(extra=torch.ones(3)))
    with pytest.raises(InputError, match="unexpected keys: extra"):
        checkpoint.load(copy)


def test_a_code_past_the_codebook_is_refused(copy):
    edit_tensors(copy, lambda tensors: tensors[f"{LAYER}.stored.codes"].fill_(255))
    with pytest.raises(InputError, match=rf"{LAYER}: code 7 exceeds the codebook of 7 centroids"):
        checkpoint.load(copy)
    with pytest.raises(InputError, match="code 7 exceeds"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_an_unknown_format_is_refused(copy):
    edit_config(copy, lambda config: config.update(format=99))
    with pytest.raises((InputError, ValueError), match=r"format 99: this version reads 1"):
        AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(InputError, match=r"format 99: this version reads 1"):
        checkpoint.load(copy)


def test_a_config_that_contradicts_tensors_or_model_is_refused(copy):
    """Before a tensor is read or made: what is said to be large takes no memory and no time."""
    text = (copy / "config.json").read_text()
    many = {f"model.layers.{number}.mlp.up_proj": json.loads(text)["quantization_config"]["weights"][LAYER]
            for number in (1, 7)}  # fmt: skip
    for change in (
        {"codebook_size": 8}, {"vector_dim": 3}, {"kind": "no such kind"}, {"codebooks": 10_000_000},
        {"codebooks": 0}, {"codebooks": 1.0}, {"codebooks": True}, {"codebooks": "1"}, {"out_features": 2**40},
        {"out_features": 32, "in_features": 48}, {"axis": "up"}, {"storage": "float64"}, {"storage": "float8"},
        {"scaled": True}, {"more": 1}, {"kind": "sum", "parts": []}, {"shares": LAYER},
    ):  # fmt: skip
        edit_config(copy, lambda config, change=change: config["weights"][LAYER].update(change))
        with pytest.raises(InputError) as caught:
            checkpoint.load(copy)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, change
        (copy / "config.json").write_text(text)
    for weights, words in ((many, "model.layers.7.mlp.up_proj is a weight of"), ([], "no kind and shapes")):
        edit_config(copy, lambda config, weights=weights: config.update(weights=weights))
        with pytest.raises(InputError, match=words):
            checkpoint.load(copy)
        (copy / "config.json").write_text(text)


def test_an_altered_spec_is_seen_where_all_shapes_agree(tiny_folder, tmp_path):
    """A square weight cut along the other axis has the same tensors and is another weight."""
    model, tokenizer = compress(tiny_folder)
    checkpoint.save(model, tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"axis": "out"', '"axis": "in"', 1))
    assert path.read_text() != text
    resign(tmp_path / "model")
    for load in (checkpoint.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((InputError, ValueError), match="altered since they were written"):
            load(tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.2.input_layernorm.weight", f"{LAYER}.stored.codebooks"]
)
def test_numbers_that_are_not_finite_are_refused(copy, name):
    for value in (torch.nan, torch.inf):
        edit_tensors(copy, lambda tensors, value=value: tensors[name].view(-1)[1:2].fill_(value))
        for load in (checkpoint.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(InputError, match=f"{name.partition('.stored')[0]}: NaN or infinity"):
                load(copy)


def test_the_originals_generation_settings_are_kept(tiny_folder, tmp_path):
    """Several end tokens, and settings that transformers would refuse to write (a temperature without sampling)."""
    values = {"eos_token_id": [0, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    folder = shutil.copytree(tiny_folder, tmp_path / "original")
    (folder / "generation_config.json").write_text(json.dumps(values))
    model, tokenizer = compress(folder)
    checkpoint.save(model, tokenizer, tmp_path / "first")
    checkpoint.save(checkpoint.load(tmp_path / "first"), tokenizer, tmp_path / "second")
    for name in ("first", "second"):
        kept = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert kept.items() >= values.items()
    opened = Opened(tmp_path / "first", torch.float32, torch.device("cpu"))  # as shard=true reads it
    assert opened.model().generation_config.to_dict().items() >= values.items()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json"):
        compress(folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tiny_folder, tmp_path):
    for folder in (tiny_folder, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no checkpoint of cluscomp"):
            checkpoint.load(folder)


@pytest.mark.parametrize("content", ["[]", '{"sha256": 3}', '{"sha256": ["ab", 1]}', '{"sha256": {}}', "{", "{}"])
def test_a_manifest_that_holds_no_hashes_is_refused(copy, content):
    (copy / checkpoint.MANIFEST).write_text(content)
    with pytest.raises(InputError, match=r"no readable cluscomp\.json"):
        checkpoint.verify(copy)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_is_never_read(copy, tmp_path):
    trap = Trap()
    trap.path = str(tmp_path / "unpickled")
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(trap))
    (copy / "model.safetensors").unlink()
    manifest = json.loads((copy / checkpoint.MANIFEST).read_text())
    del manifest["sha256"]["model.safetensors"]
    (copy / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((InputError, OSError)):
        checkpoint.load(copy)
    assert not (tmp_path / "unpickled").exists()


def test_a_full_disk_leaves_nothing(tiny_saved, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    tokenizer = AutoTokenizer.from_pretrained(tiny_saved[1])
    with pytest.raises(OSError, match=r"needs .* GB, the disk has"):
        checkpoint.save(tiny_saved[0], tokenizer, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_leaves_what_was_there(tiny_saved, copy, tmp_path):
    before = checkpoint.checkpoint_hash(copy)
    with pytest.raises(AttributeError):
        checkpoint.save(tiny_saved[0], None, copy)  # fails after the weights were written: no tokenizer
    assert checkpoint.checkpoint_hash(copy) == before
    assert list(tmp_path.iterdir()) == [copy]


def test_a_place_that_cannot_be_written_is_an_os_error(tiny_saved, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        checkpoint.save(tiny_saved[0], AutoTokenizer.from_pretrained(tiny_saved[1]), tmp_path / "file" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_part_gives_its_layers_back_and_a_damaged_one_nothing(tiny_saved, tiny_folder, ids, tmp_path):
    model, path = tiny_saved[0], tmp_path / "block.safetensors"
    assert read_part(path) is None
    save_part(path, blocks(model)[1], {"loss": 0.5})
    part = read_part(path)
    assert part.numbers == {"loss": 0.5}
    block = blocks(Original(tiny_folder, torch.float32, torch.device("cpu")).load_all())[1]
    put_part(block, part)
    for name, layer in compressed(blocks(model)[1]).items():
        assert isinstance(block.get_submodule(name), CompressedLinear)
        assert torch.equal(block.get_submodule(name).stored(torch.float32), layer.stored(torch.float32))
    raw = path.read_bytes()
    for damage in (b"", raw[:7], raw[:-5]):
        path.write_bytes(damage)
        assert read_part(path) is None


def test_gradients_reach_the_codebooks_of_a_loaded_model(tiny_saved, ids):
    loaded = checkpoint.load(tiny_saved[1])
    books = [layer.stored.codebooks.requires_grad_(True) for layer in compressed(loaded).values()]
    loaded(ids, labels=ids).loss.backward()
    assert all(book.grad is not None and book.grad.any() for book in books)


# codebooks that the layers of a block share


@pytest.fixture(scope="module")
def shared(family, tmp_path_factory):
    """Of each family in turn: a model with one codebook a block, and the folder it was saved to (read it only)."""
    model, tokenizer = compress(family, share="block")
    folder = tmp_path_factory.mktemp("shared") / "model"
    checkpoint.save(model, tokenizer, folder)
    return model, folder


def books(model) -> list[set[int]]:
    """The different codebooks of each block, by identity."""
    return [{id(layer.stored.codebooks) for layer in compressed(block).values()} for block in blocks(model)]


def test_shared_codebooks_are_stored_once_and_come_back_shared(shared, ids, tmp_path):
    model, folder = shared
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert sum(name.endswith(".codebooks") for name in file.keys()) == len(blocks(model))  # noqa: SIM118
    for again in (AutoModelForCausalLM.from_pretrained(folder), checkpoint.load(folder)):
        assert all(len(block) == 1 for block in books(again)) and len(set.union(*books(again))) == len(blocks(model))
        assert not any(parameter.is_meta for parameter in again.parameters())
        assert torch.equal(logits(again, ids), logits(model, ids))
        assert size_of(again) == size_of(model)
    assert sum(size_of(model).ledger.values()) == 8 * tensor_bytes(folder)
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ids), logits(model, ids))
    checkpoint.save(checkpoint.load(folder), AutoTokenizer.from_pretrained(folder), tmp_path / "saved")
    assert checkpoint.checkpoint_hash(tmp_path / "saved") == checkpoint.checkpoint_hash(folder)


def test_gradients_of_a_loaded_model_meet_in_the_shared_codebook(shared, ids):
    loaded = checkpoint.load(shared[1])
    for layer in compressed(loaded).values():
        layer.stored.codebooks.requires_grad_(True)
    loaded(ids, labels=ids).loss.backward()
    for block in blocks(loaded):
        first, *others = compressed(block).values()
        assert first.stored.codebooks.grad.any()
        assert all(layer.stored.codebooks is first.stored.codebooks for layer in others)


def test_a_part_with_a_shared_codebook_holds_it_once(tiny_folder, tmp_path):
    model, _ = compress(tiny_folder, share="block")
    path = tmp_path / "block.safetensors"
    save_part(path, blocks(model)[1], {})
    assert sum(name.endswith(".codebooks") for name in load_file(path)) == 1
    block = blocks(Original(tiny_folder, torch.float32, torch.device("cpu")).load_all())[1]
    put_part(block, read_part(path))
    assert len({id(layer.stored.codebooks) for layer in compressed(block).values()}) == 1
    for name, layer in compressed(blocks(model)[1]).items():
        assert torch.equal(block.get_submodule(name).stored(torch.float32), layer.stored(torch.float32))
        assert block.get_submodule(name).stored.ledger() == layer.stored.ledger()


def test_a_missing_shared_codebook_is_refused(tiny_folder, tmp_path):
    model, tokenizer = compress(tiny_folder, share="block")
    checkpoint.save(model, tokenizer, tmp_path / "model")
    first = "model.layers.1.self_attn.q_proj.stored.codebooks"
    edit_tensors(tmp_path / "model", lambda tensors: tensors.pop(first))
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        checkpoint.load(tmp_path / "model")


def test_a_share_in_a_layer_that_is_not_there_is_refused(tiny_folder, tmp_path):
    model, tokenizer = compress(tiny_folder, share="block")
    checkpoint.save(model, tokenizer, tmp_path / "model")
    edit_config(tmp_path / "model", lambda config: config["weights"][LAYER].update(shares="nothing"))
    with pytest.raises(InputError, match="nothing"):
        checkpoint.load(tmp_path / "model")


def test_a_checkpoint_is_as_readable_as_the_users_umask_says(tiny_saved, tmp_path):
    before = os.umask(0o027)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tiny_saved[1])
        checkpoint.save(tiny_saved[0], tokenizer, tmp_path / "made" / "checkpoint")
        save_part(tmp_path / "part.safetensors", blocks(tiny_saved[0])[0], {})
    finally:
        os.umask(before)
    places = [*(tmp_path / "made").rglob("*"), tmp_path / "made", tmp_path / "part.safetensors"]
    assert {place.stat().st_mode & 0o777 for place in places if place.is_dir()} == {0o750}
    assert {place.stat().st_mode & 0o777 for place in places if place.is_file()} == {0o640}
