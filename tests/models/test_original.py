"""Opening original models block by block against transformers' own loading, and what is refused, by name."""

import shutil
from pathlib import Path

import pytest
import torch
from reference.recipe import NO_DATA, PAPER, STORED
from safetensors.torch import load_file, save_file
from streamed import opened, streamed_logits
from transformers import AutoModelForCausalLM

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.methods.cluscomp import ClusComp
from cluscomp.models.files import file_hashes, fingerprint
from cluscomp.models.original import Original, block_names, blocks, linears
from cluscomp.stages.clustering import compress_block


@torch.no_grad()
def test_streamed_and_whole_models_give_transformers_logits(family, ids):
    expected = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()(ids).logits
    assert expected.isfinite().all() and expected.std() > 0.01
    original = opened(family)
    assert torch.equal(streamed_logits(original, ids), expected)
    assert torch.equal(original.load_all()(ids).logits, expected)


@torch.no_grad()
def test_a_16_bit_model_too(families, ids):
    expected = AutoModelForCausalLM.from_pretrained(families("gemma2"), dtype=torch.bfloat16).eval()(ids).logits
    assert torch.equal(streamed_logits(opened(families("gemma2"), torch.bfloat16), ids), expected)


def test_only_the_block_in_use_is_in_memory(family):
    original = opened(family)
    model = original.model()
    inside = tuple(f"{name}." for name in block_names(model))
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == name.startswith(inside), name
        assert not parameter.requires_grad
    with original.block(model, 1) as block:
        assert block is blocks(model)[1]
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for parameter in blocks(model)[0].parameters())
    assert all(parameter.is_meta for parameter in blocks(model)[1].parameters())


def test_a_block_is_put_away_after_a_failure_too(tiny_folder):
    original = opened(tiny_folder)
    model = original.model()
    with pytest.raises(ZeroDivisionError), original.block(model, 0):
        _ = 1 / 0
    assert all(parameter.is_meta for parameter in blocks(model)[0].parameters())


def test_blocks_and_linears_have_transformers_names(families):
    model = opened(families("opt")).model()
    assert block_names(model) == [f"model.decoder.layers.{index}" for index in range(3)]
    assert set(linears(blocks(model)[0])) == {
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"
    }  # fmt: skip
    assert block_names(opened(families("phi")).model())[0] == "model.layers.0"


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    """A copy of the tiny folder, and a function that rewrites its tensors."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)

    def change(edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return folder, change


def one_sentence(caught):
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return True


def test_a_missing_tensor_is_named(damaged):
    folder, change = damaged
    change(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight \(1 of ") as caught:
        opened(folder).model()
    assert one_sentence(caught)


def test_a_tensor_of_the_wrong_shape_is_named(damaged):
    folder, change = damaged
    name = "model.layers.0.mlp.up_proj.weight"
    change(lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(InputError, match=r"up_proj\.weight: shape \(47, 32\) in the file, \(48, 32\) in the config"):
        opened(folder).load_all()


@torch.no_grad()
def test_a_head_of_its_own_counts_whatever_the_config_ties(damaged, ids, tmp_path):
    """What transformers does; what is made of the model says so in its config, and an equal head stays tied."""
    folder, change = damaged
    change(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert opened(folder).config.tie_word_embeddings
    change(lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    original = opened(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert torch.equal(original.load_all()(ids).logits, expected) and not original.config.tie_word_embeddings
    model, tokenizer = original.load_all(), original.tokenizer
    method = ClusComp(bits=None, vector_dim=2, codebook_size=4, iterations=1, **PAPER, **STORED, **NO_DATA)
    for name, block in zip(block_names(model), blocks(model)):
        compress_block(method, block, name, 0, {})
    expected = model(ids).logits
    checkpoint.save(model, tokenizer, tmp_path / "saved")
    assert torch.equal(checkpoint.load(tmp_path / "saved")(ids).logits, expected)


@torch.no_grad()
def test_only_the_models_own_files_are_read_and_counted(damaged, ids):
    folder, _ = damaged
    before, hashes, tensors = opened(folder).size(), file_hashes(folder), load_file(folder / "model.safetensors")
    expected = opened(folder).load_all()(ids).logits
    save_file({name: torch.zeros_like(one) for name, one in tensors.items()}, folder / "zeros.safetensors")
    save_file({f"other.{name}": one for name, one in tensors.items()}, folder / "consolidated.safetensors")
    assert opened(folder).size() == before and file_hashes(folder) == hashes
    assert torch.equal(opened(folder).load_all()(ids).logits, expected)


@pytest.fixture
def shards(tiny_folder, tmp_path):
    """The tiny model in several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    opened(tiny_folder).tokenizer.save_pretrained(tmp_path / "shards")
    return tmp_path / "shards"


def test_a_tensor_in_two_files_and_a_missing_file_are_named(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    whole, (name, tensor) = load_file(second), next(iter(load_file(first).items()))
    stray = shards / "another.safetensors"
    save_file({name: torch.zeros_like(tensor)}, stray)
    assert all(one.any() for _, one in opened(shards).tensors([name]))  # no file of the index
    save_file(whole | {name: tensor}, second)
    with pytest.raises(InputError, match=f"{second.name}: {name} is also in {first.name}") as caught:
        opened(shards)
    assert one_sentence(caught)
    second.unlink()
    with pytest.raises(InputError, match=f"{second.name}: missing, though model.safetensors.index.json") as caught:
        opened(shards)
    assert one_sentence(caught)
    stray.unlink()


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../secret"}}'])
def test_an_index_that_is_none_is_named(shards, index):
    (shards / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: ") as caught:
        opened(shards)
    assert one_sentence(caught)


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_a_truncated_file_is_named(damaged, keep):
    path = damaged[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated") as caught:
        opened(damaged[0])
    assert one_sentence(caught)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(damaged, value):
    folder, change = damaged
    change(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"][3, 4].fill_(value))
    model = opened(folder).load_all()
    method = ClusComp(bits=None, vector_dim=2, codebook_size=4, iterations=1, **PAPER, **STORED, **NO_DATA)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj: NaN or infinity") as caught:
        compress_block(method, blocks(model)[1], "model.layers.1", 0, {})
    assert one_sentence(caught)


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "no_such_family"}'),
        ("tokenizer.json", "{"),
    ],
)
def test_a_damaged_text_file_is_one_sentence(damaged, file, content):
    (damaged[0] / file).write_text(content)
    with pytest.raises(InputError, match=damaged[0].name) as caught:
        opened(damaged[0])
    assert one_sentence(caught)


def test_every_byte_counts_in_the_fingerprint(damaged):
    folder, _ = damaged
    first = fingerprint(folder)
    assert first == fingerprint(folder)
    seen = {first}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        raw = bytearray((folder / name).read_bytes())
        raw[-2] ^= 1
        (folder / name).write_bytes(raw)
        seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_tokenizers_of_text_files_count_where_there_is_no_other(damaged):
    folder, _ = damaged
    (folder / "merges.txt").write_text("a b\n")
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "README.txt").write_text("no part of the model")
    assert not [name for name in file_hashes(folder) if name.endswith(".txt")]
    (folder / "tokenizer.json").unlink()
    assert [name for name in file_hashes(folder) if name.endswith(".txt")] == ["merges.txt", "vocab.txt"]
    first = fingerprint(folder)
    (folder / "merges.txt").write_text("b a\n")
    assert fingerprint(folder) != first


def test_the_size_of_the_original_by_hand(tiny_folder):
    numbers = 257 * 32 + 7 * 32 + 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    size = opened(tiny_folder).size()
    assert size["model_bits_per_weight"] == 32
    assert 0 < size["checkpoint_bytes"] - 4 * numbers < 10_000  # the header


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_what_was_read_of_a_file_is_let_go_of(tiny_folder):
    """Norms stay when a block is compressed; in the file's own type they could be a view of the mapped file."""
    original = Original(tiny_folder, torch.float32, torch.device("cpu"))
    model = original.model()
    original.load_block(model, 0)
    assert str(tiny_folder / "model.safetensors") not in Path("/proc/self/maps").read_text()
