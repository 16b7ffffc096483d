"""Quantised GGUF files are scored as they are, at the bits that they store, counted here by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType, dequantize
from gguf_files import TOKENS, llama
from pipelines import pipeline
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluscomp.errors import InputError
from cluscomp.models import sources
from cluscomp.models.files import fingerprint
from cluscomp.models.gguf_file import matrices_in, outline
from cluscomp.models.sources import GgufModel, read_config
from cluscomp.report import page
from cluscomp.report.comparison import perplexity_table
from cluscomp.report.pareto import pareto
from cluscomp.store.records import read

WIDTH = 256  # what K-quants and i-quants need
MIX = {
    "blk.0.attn_q": "IQ2_XXS", "blk.0.attn_k": "Q4_0", "blk.0.attn_v": "Q8_0", "blk.0.attn_output": "F16",
    "blk.0.ffn_gate": "IQ2_XXS", "blk.0.ffn_up": "IQ1_S", "blk.0.ffn_down": "Q6_K",
    "token_embd": "Q8_0", "output": "IQ3_XXS",
}  # fmt: skip
# bits of 256 numbers with their scales, from llama.cpp's ggml-common.h: 2 bytes of scale and 64 of codes, and so on
BLOCK = {
    "IQ2_XXS": 8 * (2 + 64), "IQ1_S": 8 * (2 + 32 + 16), "IQ3_XXS": 8 * (2 + 96), "Q6_K": 8 * (128 + 64 + 16 + 2),
    "Q4_0": 8 * 8 * (2 + 16), "Q8_0": 8 * 8 * (2 + 32), "F16": 16 * 256,
}  # fmt: skip
SCALE = {"Q6_K": 208}  # the byte at which the scale of a block begins, 0 of others


def mixed(rows: int, width: int, name: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Random codes of the type that MIX names, with scales that are small."""
    kind = GGMLQuantizationType[MIX[name]]
    random = np.random.default_rng(len(name))
    if kind == GGMLQuantizationType.F16:
        return (random.standard_normal((rows, width)) / 16).astype(np.float16), kind
    numbers, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, width // numbers, size), dtype=np.uint8)
    at = SCALE.get(kind.name, 0)
    blocks[..., at : at + 2] = np.frombuffer(np.float16(2**-10).tobytes(), np.uint8)
    return blocks.reshape(rows, -1), kind


def plain(rows: int, width: int, name: str) -> tuple[np.ndarray, None]:
    """Random numbers in 16 bits."""
    return (np.random.default_rng(len(name)).standard_normal((rows, width)) / 16).astype(np.float16), None


def told(writer) -> None:
    writer.add_file_type(LlamaFileType.MOSTLY_IQ2_XXS)
    writer.add_string("quantize.imatrix.file", "/home/me/secret/imatrix.gguf")
    writer.add_string("quantize.imatrix.dataset", "/home/me/secret/wiki.train.raw")
    writer.add_uint32("quantize.imatrix.chunks_count", 32)


@pytest.fixture(scope="module")
def rival(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("rival") / "small-IQ2_XXS.gguf", WIDTH, mixed, told)


@pytest.fixture(scope="module")
def command(ground) -> list[str]:
    return [
        "data=text", f"data.file={ground / 'text.txt'}", "evaluate.context=32", "evaluate.limit=3",
        f"outputs={ground / 'outputs'}", f"cache={ground / 'cache'}",
    ]  # fmt: skip


def scored(file: Path, command: list[str], *more: str):
    return pipeline("model=gguf", f"model.file={file}", *command, "order=[evaluate]", *more)


def test_a_mixed_file_counts_with_its_own_bits(rival, command):
    record = read(scored(rival, command).path)
    found, size = record.stages["external"]["found"], record.stages["external"]["size"]
    inside = [BLOCK[kind] for name, kind in MIX.items() if name.startswith("blk")]
    assert size["linear_bits_per_weight"] == sum(inside) / 256 / 7
    outside = len(TOKENS) * (BLOCK["Q8_0"] + BLOCK["IQ3_XXS"]) + 32 * 3 * WIDTH
    in_all, numbers = WIDTH * sum(inside) + outside, 7 * WIDTH**2 + 2 * len(TOKENS) * WIDTH + 3 * WIDTH
    assert size["model_bits_per_weight"] == in_all / numbers and size["checkpoint_bytes"] == in_all // 8
    assert size == record.size["original"]
    kinds = [kind for name, kind in MIX.items() if name.startswith("blk")]
    assert found["matrices"] == {kind: kinds.count(kind) for kind in kinds}
    assert found["ledger"] == {kind: WIDTH * BLOCK[kind] * kinds.count(kind) for kind in kinds}
    assert sum(found["outside"].values()) == outside and set(found["outside"]) == {"Q8_0", "IQ3_XXS", "F32"}
    assert found["method"] == "IQ2_XXS" and found["file"] == {"name": rival.name, "bytes": rival.stat().st_size}
    assert found["importance_matrix"] == {"file": "imatrix.gguf", "dataset": "wiki.train.raw", "chunks_count": 32}
    assert found["calibration"] == "wiki.train.raw" and "secret" not in Path(scored(rival, command).path).read_text()


def test_its_numbers_are_those_of_the_file(rival, tmp_path):
    """To the last bit, as the package gguf makes them; those of queries and keys lie in another order."""
    source = GgufModel(file=str(rival), package=None, of=None, calibration=None)
    weights = load_file(source.folder(tmp_path, to_score=True) / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in GGUFReader(rival).tensors}
    block = "model.layers.0"
    for name, ours in {
        "blk.0.attn_v": f"{block}.self_attn.v_proj", "blk.0.attn_output": f"{block}.self_attn.o_proj",
        "blk.0.ffn_gate": f"{block}.mlp.gate_proj", "blk.0.ffn_up": f"{block}.mlp.up_proj",
        "blk.0.ffn_down": f"{block}.mlp.down_proj", "token_embd": "model.embed_tokens", "output": "lm_head",
    }.items():  # fmt: skip
        expected = torch.from_numpy(dequantize(tensors[f"{name}.weight"].data, tensors[f"{name}.weight"].tensor_type))
        assert torch.equal(weights[f"{ours}.weight"], expected.float()), name
    queries = dequantize(tensors["blk.0.attn_q.weight"].data, tensors["blk.0.attn_q.weight"].tensor_type)
    found = weights[f"{block}.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(np.sort(found, axis=0), np.sort(queries, axis=0)) and found.std() > 0


def test_it_stands_beside_the_methods_of_its_original(rival, tmp_path, command):
    how = ["method=cluscomp_data_free", "method.vector_dim=4", "method.codebook_size=16"]
    original = llama(tmp_path / "small.gguf", WIDTH, plain)
    ours = pipeline("model=gguf", f"model.file={original}", *command, *how).record
    theirs = scored(rival, command, "model.of=small").record
    table = perplexity_table([ours, theirs]).set_index("method")
    row = table.loc["IQ2_XXS (GGUF, external)"]
    assert table["model"].nunique() == 1 and row["model"] == "small" and row["limit"] == f"{row['stored bits']:.3g}"
    assert row["learned from"] == "wiki.train.raw"
    assert "IQ2_XXS (GGUF, external)" in set(pareto([ours, theirs])["method"])
    assert "external: made by another library" in page.page("both", [ours, theirs], "md")["tables.md"]


def test_what_is_said_of_it_is_in_its_record_and_its_key(rival, command, ground):
    alone = scored(rival, command).record
    assert {score.after for score in alone.scores} == {"external"} and not alone.scores[0].seen["external"]["in_domain"]
    domain = str((ground / "text.txt").absolute())
    said = scored(rival, command, f"model.calibration={domain}").record
    assert said.run["key"] != alone.run["key"] and said.scores[0].seen["external"]["in_domain"]
    assert [score.value for score in said.scores] == [score.value for score in alone.scores]


def test_without_words_of_its_own_its_calibration_is_unknown(command, tmp_path):
    record = scored(llama(tmp_path / "silent.gguf", WIDTH, mixed), command).record
    found = record.stages["external"]["found"]
    assert found["calibration"] is None and found["importance_matrix"] is None and not record.scores[0].seen
    assert found["method"] == "IQ1_S+IQ2_XXS+IQ3_XXS+Q4_0+Q6_K+Q8_0"
    assert list(perplexity_table([record])["learned from"]) == ["unknown"]


def test_a_file_in_32_bit_stays_an_original(small_gguf, command):
    record = scored(small_gguf, command).record
    assert {score.after for score in record.scores} == {"original"} and not record.stages


def test_a_rival_is_not_compressed(rival, command):
    with pytest.raises(InputError, match=r"model\.of=small: a file that stands for another model is scored"):
        pipeline("model=gguf", f"model.file={rival}", "model.of=small", *command, "order=[cluster]", "bits=3")


def test_a_type_whose_numbers_cannot_be_read_is_named(command, tmp_path):
    def unread(rows, width, name):
        if name == "blk.0.ffn_up":
            return np.zeros((rows, width // 256 * 292), np.uint8), GGMLQuantizationType.Q8_K
        return mixed(rows, width, name)

    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight is of type Q8_K, which the package gguf .* cannot"):
        scored(llama(tmp_path / "q8_k.gguf", WIDTH, unread), command)


def test_a_type_that_is_not_known_is_named(rival, command, tmp_path):
    content, name = rival.read_bytes(), b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert int.from_bytes(content[at : at + 4], "little") == GGMLQuantizationType.IQ1_S
    (tmp_path / "new.gguf").write_bytes(content[:at] + (999).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight is of type number 999, which the package gguf"):
        scored(tmp_path / "new.gguf", command)


def test_a_layer_without_a_tensor_is_named(rival):
    with pytest.raises(InputError, match=r"no tensor blk\.0\.attn_q\.weight for model\.layers\.0\.self_attn\.q_proj"):
        found = outline(rival)
        del found["tensors"]["blk.0.attn_q.weight"]
        matrices_in(found, ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"])


# what transformers does not read


def frequencies(factor: float) -> np.ndarray:
    """By what llama.cpp's converter says Llama 3 divides the frequencies of heads 16 wide, one by one."""
    found = []
    for number in range(8):
        length = 2 * np.pi * 1e4 ** (number / 8)
        smooth = (8192 / length - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if length < 8192 / 4 else factor if length > 8192 else between)
    return np.array(found, dtype=np.float32)


def converted(folder: Path, say) -> Path:
    """The folder made of a file of which `say` writes more."""
    file = llama(folder / "file.gguf", say=say)
    return GgufModel(file=str(file), package=None, of=None, calibration=None).folder(folder / "cache")


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "rope_factors_long.weight"])
def test_a_tensor_that_transformers_passes_over_is_named(name, tmp_path):
    with pytest.raises(InputError, match=rf"without tensor {name} \(1 such\), so it would be another model"):
        converted(tmp_path, lambda writer: writer.add_tensor(name, np.ones(32, dtype=np.float32)))
    assert not list((tmp_path / "cache").glob("gguf-*"))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequencies_of_llama_3_are_put_into_the_config(factor, tmp_path):
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 1e4}
    told = frequencies(factor)
    folder = converted(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", told))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.rope_parameters == rope and 1 < told[6] < told[7] == factor
    expected = 1e4 ** (-np.arange(8) / 8) / told
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), expected, rtol=1e-3)


def test_other_frequencies_are_refused_and_those_of_1_change_nothing(tmp_path):
    for values in (frequencies(8.0) * 1.01, frequencies(16.0), frequencies(8.0)[4:]):
        with pytest.raises(InputError, match=r"tensor rope_freqs\.weight scales positions neither by 1 nor as Llama 3"):
            converted(tmp_path, lambda writer, values=values: writer.add_tensor("rope_freqs.weight", values))
    folder = converted(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32)))
    assert read_config(folder).rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"type": "yarn", "factor": 4.0}, True), ({"type": "linear", "factor": 2.0}, True), ({"factor": 2.0}, True),
        ({"type": "none"}, False), ({"type": "linear", "factor": 1.0}, False), ({"factor": 0.0}, False),
    ],
)  # fmt: skip
def test_a_scaling_of_positions_that_transformers_does_not_make_is_refused(said, refused, tmp_path):
    def say(writer) -> None:
        for key, value in said.items():
            (writer.add_string if key == "type" else writer.add_float32)(f"llama.rope.scaling.{key}", value)

    if refused:
        told = ", ".join(f"llama.rope.scaling.{key}={value}" for key, value in said.items())
        with pytest.raises(InputError, match=rf"{re.escape(told)}, but transformers .* scales positions by 'default'"):
            converted(tmp_path, say)
    else:
        converted(tmp_path, say)


def test_a_conversion_of_other_versions_is_not_taken_and_makes_the_same(small_gguf, tmp_path, monkeypatch):
    source = GgufModel(file=str(small_gguf), package=None, of=None, calibration=None)
    first = source.folder(tmp_path)
    for place, name, value in ((sources, "CONVERTER", 0), (sources.importlib.metadata, "version", lambda _: "9.9")):
        with monkeypatch.context() as changed:
            changed.setattr(place, name, value)
            other = source.folder(tmp_path)
        assert other != first and fingerprint(other) == fingerprint(first)  # so keys stay
    assert source.folder(tmp_path) == first
