"""Checkpoints in other libraries' formats: read back by those libraries where they are installed, and by hand."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from reference.recipe import NO_DATA, PAPER, STORED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.formats.export import FORMATS, _compared, export
from cluscomp.forms import adapters
from cluscomp.forms.linear import compressed
from cluscomp.methods.awq import Awq
from cluscomp.methods.cluscomp import ClusComp
from cluscomp.methods.rtn import RoundToNearest
from cluscomp.models.original import Original, block_names, blocks
from cluscomp.stages.clustering import compress_block


def codebooks(**other):
    settings = {"bits": None, "vector_dim": 3, "codebook_size": 12, "iterations": 2} | PAPER | STORED | NO_DATA | other
    return ClusComp(**settings)


def grid(width, group, symmetric=False):
    return RoundToNearest(bits=None, width=width, group=group, symmetric=symmetric)


METHODS = {
    "codebooks": codebooks(),
    "one shape": codebooks(vector_dim=4, codebook_size=16, axis="in"),
    "8 bits": codebooks(storage="int8"),
    "shared": codebooks(share="block"),
    "4 bits": grid(4, 32),
    "4 bits symmetric": grid(4, 32, symmetric=True),
    "3 bits a row": grid(3, None),
    "2 bits symmetric": grid(2, 32, symmetric=True),
    "8 bits symmetric": grid(8, 32, symmetric=True),
    "groups of 20": grid(4, 20),
    "6 bits": grid(6, 32),
}


@pytest.fixture(scope="module")
def folder(families):
    """A small Llama whose sizes are multiples of 32, as kernels want them."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    return families("llama", **sizes, num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """The checkpoint of a method, made once. Read it only."""
    found = {}

    def make(name):
        if name not in found:
            found[name] = tmp_path_factory.mktemp("checkpoints") / "model"
            save(folder, METHODS[name], found[name])
        return found[name]

    return make


def save(folder, method, place):
    original = Original(folder, torch.float32, torch.device("cpu"))
    model = original.load_all()
    for name, block in zip(block_names(model), blocks(model)):
        compress_block(method, block, name, seed=0, statistics={})
    checkpoint.save(model, original.tokenizer, place)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def weights(folder, dtype):
    """The weight that each layer of a checkpoint rebuilds."""
    layers = compressed(checkpoint.load(folder, dtype))
    return {name: layer.stored(dtype).detach() for name, layer in layers.items()}


def by_hand(words_RW, bits, count):
    """The numbers in rows of 32-bit words: (R, W) -> (R, count)."""
    bytes_ = words_RW.contiguous().numpy().view(np.uint8)
    stream = np.unpackbits(bytes_, axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy(stream.reshape(len(bytes_), count, bits) @ (1 << np.arange(bits)))


def written(place):
    config = json.loads((place / "config.json").read_text())
    return load_file(place / "model.safetensors"), config, config["quantization_config"]


@pytest.mark.parametrize("name", ["codebooks", "4 bits", "8 bits"])
def test_dense_computes_what_the_checkpoint_does_bit_by_bit(made, tmp_path, ids, name):
    model = checkpoint.load(made(name))
    lost = export(made(name), format="dense", output=tmp_path / "dense", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.float32 and not compressed(dense)
    assert torch.equal(logits(dense, ids), logits(model, ids))
    assert len(lost) == 1 and lost[0].startswith("size: ") and lost[0].endswith("become 32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer("abc").input_ids == AutoTokenizer.from_pretrained(made(name))("abc").input_ids


def test_dequantize_gives_the_same_in_memory_in_any_dtype(made, tmp_path, ids):
    export(made("codebooks"), format="dense", output=tmp_path / "dense", dtype="bfloat16")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    model = checkpoint.load(made("codebooks"), torch.bfloat16).dequantize()
    assert dense.dtype == model.dtype == torch.bfloat16 and not compressed(model)
    assert torch.equal(logits(dense, ids), logits(model, ids))
    expected = weights(made("codebooks"), torch.bfloat16)
    assert all(torch.equal(dense.get_submodule(name).weight, weight) for name, weight in expected.items())
    wide = checkpoint.load(made("codebooks")).dequantize(torch.float16)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float16}
    wide.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("name", ["codebooks", "shared", "8 bits"])
def test_vptq_holds_every_weight_bit_by_bit(made, tmp_path, name):
    lost = export(made(name), format="vptq", output=tmp_path / "vptq")
    tensors, config, quantization = written(tmp_path / "vptq")
    assert config["dtype"] == "float16" and quantization["modules_to_not_convert"] == ["lm_head"]
    expected = weights(made(name), torch.float16)
    assert quantization["config_for_layers"].keys() == expected.keys()
    for layer, weight_OI in expected.items():
        said = quantization["config_for_layers"][layer]
        outputs, inputs = weight_OI.shape
        length, count = said["vector_lens"][1], said["num_centroids"][1]
        assert (said["in_features"], said["out_features"], said["group_size"]) == (inputs, outputs, inputs)
        bits = count.bit_length() - 1
        assert count == 2**bits == 16
        codes_GI = by_hand(tensors[f"{layer}.indices"][0], bits, inputs)
        book_KD = tensors[f"{layer}.centroids.weight"].view(count, length)
        assert torch.equal(book_KD[codes_GI].permute(0, 2, 1).reshape(-1, inputs)[:outputs], weight_OI), layer
    assert any("rounded to float16" in sentence for sentence in lost) == (name in ("8 bits", "shared"))
    assert any("copy of their own" in sentence for sentence in lost) == (name == "shared")


def test_vptq_is_what_its_own_package_reads(made, tmp_path):
    vptq = pytest.importorskip("vptq")
    export(made("codebooks"), format="vptq", output=tmp_path / "vptq")
    tensors, _, quantization = written(tmp_path / "vptq")
    for name, weight_OI in weights(made("codebooks"), torch.float16).items():
        layer = vptq.VQuantLinear(
            **quantization["config_for_layers"][name], enable_proxy_error=False, dtype=torch.float16
        )
        parts = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}
        layer.load_state_dict(parts)
        x = torch.eye(weight_OI.shape[1], dtype=torch.float16)
        with torch.no_grad():
            assert torch.equal(layer(x).T, weight_OI), name


@pytest.mark.parametrize("name", ["4 bits", "4 bits symmetric", "3 bits a row", "2 bits symmetric"])
def test_gptq_holds_every_weight(made, tmp_path, name):
    export(made(name), format="gptq", output=tmp_path / "gptq")
    tensors, _, said = written(tmp_path / "gptq")
    less = 1 if said["checkpoint_format"] == "gptq" else 0
    assert said["sym"] == bool(less) == ("symmetric" in name)
    assert (said["bits"], said["group_size"]) == (int(name[0]), -1 if "row" in name else 32)
    for layer, weight_OI in weights(made(name), torch.float16).items():
        outputs, inputs = weight_OI.shape
        part = {key: tensors[f"{layer}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        assert part["qweight"].shape == (inputs * said["bits"] // 32, outputs)
        codes_IO = by_hand(part["qweight"].T, said["bits"], inputs).T
        zeros_GO = by_hand(part["qzeros"], said["bits"], outputs) + less
        of_I = part["g_idx"].long()
        assert torch.equal(((codes_IO - zeros_GO[of_I]) * part["scales"][of_I].float()).half().T, weight_OI), layer


@pytest.mark.parametrize("name", ["4 bits", "4 bits symmetric", "3 bits a row", "6 bits"])
def test_compressed_tensors_holds_every_weight(made, tmp_path, name):
    export(made(name), format="compressed-tensors", output=tmp_path / "packed")
    tensors, _, said = written(tmp_path / "packed")
    of_layer = {layer: group["weights"] for group in said["config_groups"].values() for layer in group["targets"]}
    for layer, weight_OI in weights(made(name), torch.float16).items():
        bits = of_layer[layer]["num_bits"]
        outputs, inputs = tensors[f"{layer}.weight_shape"].tolist()
        codes_OI = by_hand(tensors[f"{layer}.weight_packed"], bits, inputs)
        zeros = tensors.get(f"{layer}.weight_zero_point")
        scales_OG = tensors[f"{layer}.weight_scale"]
        zeros_OG = torch.full_like(scales_OG, 2 ** (bits - 1)) if zeros is None else by_hand(zeros.T, bits, outputs).T
        each = inputs // scales_OG.shape[1]
        steps_OI = codes_OI - zeros_OG.repeat_interleave(each, 1)
        assert torch.equal((steps_OI * scales_OG.repeat_interleave(each, 1).float()).half(), weight_OI), layer


@pytest.mark.parametrize("name", ["4 bits", "3 bits a row", "4 bits symmetric"])
def test_transformers_loads_compressed_tensors(made, tmp_path, ids, name):
    pytest.importorskip("compressed_tensors")
    lost = export(made(name), format="compressed-tensors", output=tmp_path / "packed")
    as_dense = CompressedTensorsConfig(dequantize=True)  # only so it loads zeros, which it does not pack itself
    more = {} if "symmetric" in name else {"quantization_config": as_dense}
    assert any("dequantize=True" in sentence for sentence in lost) == bool(more)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **more)
    dense = checkpoint.load(made(name), torch.float16).dequantize()
    assert torch.equal(logits(model, ids), logits(dense, ids))


def test_rows_that_fill_no_whole_words_are_written(families, tmp_path):
    """A part of a packed tensor is another's storage, which no file of safetensors takes."""
    folder = families("llama", hidden_size=64, intermediate_size=44, num_attention_heads=4, head_dim=16)
    save(folder, METHODS["3 bits a row"], tmp_path / "model")
    export(tmp_path / "model", format="compressed-tensors", output=tmp_path / "packed")
    tensors, _, _ = written(tmp_path / "packed")
    expected = weights(tmp_path / "model", torch.float16)["model.layers.0.mlp.up_proj"]
    part = {key: tensors[f"model.layers.0.mlp.up_proj.weight_{key}"] for key in ("packed", "scale", "zero_point")}
    steps_OI = by_hand(part["packed"], 3, 64) - by_hand(part["zero_point"].T, 3, 44).T
    assert torch.equal((steps_OI * part["scale"].float()).half(), expected)


def test_aqlm_holds_every_weight(made, tmp_path):
    export(made("one shape"), format="aqlm", output=tmp_path / "aqlm")
    tensors, _, said = written(tmp_path / "aqlm")
    assert (said["num_codebooks"], said["nbits_per_codebook"], said["in_group_size"]) == (1, 4, 4)
    assert said["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight"]
    for layer, weight_OI in weights(made("one shape"), torch.float16).items():
        codes_OGM = tensors[f"{layer}.codes"].long() % 2 ** said["nbits_per_codebook"]
        books_MKD = tensors[f"{layer}.codebooks"][:, :, 0]
        made_OGD = sum(books_MKD[m][codes_OGM[..., m]] for m in range(len(books_MKD)))
        assert torch.equal(made_OGD.flatten(1) * tensors[f"{layer}.scales"].view(-1, 1), weight_OI), layer


def test_aqlm_is_what_its_own_package_reads(made, tmp_path):
    utils = pytest.importorskip("aqlm.utils")
    export(made("one shape"), format="aqlm", output=tmp_path / "aqlm")
    tensors, _, said = written(tmp_path / "aqlm")
    for layer, weight_OI in weights(made("one shape"), torch.float16).items():
        codes_OGM = utils.unpack_int_data(tensors[f"{layer}.codes"], said["nbits_per_codebook"])
        books, scales = tensors[f"{layer}.codebooks"].float(), tensors[f"{layer}.scales"].float()
        assert torch.equal(utils._dequantize_weight(codes_OGM, books, scales).half(), weight_OI), layer


def test_transformers_loads_aqlm(made, tmp_path, ids):
    pytest.importorskip("aqlm")
    export(made("one shape"), format="aqlm", output=tmp_path / "aqlm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "aqlm")
    dense = checkpoint.load(made("one shape"), torch.float16).dequantize()
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=0.01, atol=0.01)


TYPES = {  # of the file's matrices inside blocks
    "4 bits symmetric": "Q4_0",
    "2 bits symmetric": "Q4_0",
    "4 bits": "Q8_0",  # where scale times zero is no number of 16 bits
    "8 bits symmetric": "Q8_0",
    "3 bits a row": "Q4_0",  # of q - zero none is beyond 7
    "codebooks": "F32",
}


@pytest.mark.parametrize("name", TYPES)
def test_gguf_is_read_back_as_the_same_model(made, tmp_path, ids, name):
    from gguf import GGUFReader

    lost = export(made(name), format="gguf", output=tmp_path / "gguf", dtype="float32")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    inside = {kind for tensor, kind in types.items() if tensor.startswith("blk.") and "norm" not in tensor}
    assert TYPES[name] in inside and inside <= {TYPES[name], "Q4_1", "Q4_0"}
    assert bool(lost) == (name == "codebooks")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    dense = checkpoint.load(made(name), torch.float32).dequantize()
    for layer, weight_OI in weights(made(name), torch.float32).items():
        assert torch.equal(model.get_submodule(layer).weight, weight_OI), layer
    assert torch.equal(logits(model, ids), logits(dense, ids))


def test_gguf_holds_biases_of_queries_and_keys_in_its_order_of_heads(families, tmp_path):
    from gguf import GGUFReader

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    save(families("llama", **sizes, attention_bias=True), METHODS["4 bits symmetric"], tmp_path / "model")
    export(tmp_path / "model", format="gguf", output=tmp_path / "gguf", dtype="float32")
    tensors = {one.name: np.array(one.data) for one in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    layers = compressed(checkpoint.load(tmp_path / "model"))
    for key, heads in (("q", 4), ("k", 2)):
        bias = layers[f"model.layers.1.self_attn.{key}_proj"].bias.detach()
        expected = bias.view(heads, 2, -1).transpose(1, 2).flatten()
        assert bias.std() > 0.1 and np.array_equal(tensors[f"blk.1.attn_{key}.bias"], expected.numpy()), key
    value = layers["model.layers.1.self_attn.v_proj"].bias.detach()
    assert np.array_equal(tensors["blk.1.attn_v.bias"], value.numpy())


def test_gguf_holds_a_real_tokenizer(shared, tmp_path):
    original = Original(shared / "models" / "stories260K", torch.float32, torch.device("cpu"))
    model = original.load_all()
    for name, block in zip(block_names(model), blocks(model)):
        compress_block(METHODS["codebooks"], block, name, seed=0, statistics={})
    checkpoint.save(model, original.tokenizer, tmp_path / "model")
    export(tmp_path / "model", format="gguf", output=tmp_path / "gguf", dtype="float16")
    again = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    text = "Once upon a time, there was a little girl named Lily."
    assert again(text).input_ids == original.tokenizer(text).input_ids
    assert again.decode(again(text).input_ids, skip_special_tokens=True) == text


REFUSED = {
    "grids for vptq": ("4 bits", "vptq", ["q_proj", "format=vptq", "uniform", "dense"]),
    "the other axis for vptq": ("one shape", "vptq", ["q_proj", "along the outputs"]),
    "codebooks for gptq": ("codebooks", "gptq", ["q_proj", "format=gptq", "codebook"]),
    "six bits for gptq": ("6 bits", "gptq", ["q_proj", "2, 3, 4 or 8 bits"]),
    "unequal groups for gptq": ("groups of 20", "gptq", ["down_proj", "method.group=64"]),
    "codebooks for compressed-tensors": ("codebooks", "compressed-tensors", ["q_proj", "codebook"]),
    "the other axis for aqlm": ("codebooks", "aqlm", ["q_proj", "along the inputs"]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("format_", FORMATS)
def test_an_export_is_compared_with_what_its_own_package_reads(made, tmp_path, caplog, name, format_):
    found = FORMATS[format_]
    with caplog.at_level("INFO", "cluscomp"):
        try:
            export(made(name), format=format_, output=tmp_path / "out")
        except InputError:  # it does not hold this form
            return
    (said,) = (record.getMessage() for record in caplog.records if "compared" in record.getMessage())
    if find_spec(found.package.replace("-", "_")):
        assert said.startswith(
            f"compared: {len(weights(made(name), torch.float16))} layers are what {found.package} reads, "
        )
    else:
        assert said == f"not compared with what {found.package} reads: pip install {found.package}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_of_16_bits_are_compared_as_such(made, tmp_path, caplog, dtype):
    with caplog.at_level("INFO", "cluscomp"):
        export(made("codebooks"), format="gguf", output=tmp_path / "out", dtype=dtype)
    assert "compared: 14 layers are what gguf reads, bit by bit" in caplog.text


@pytest.mark.parametrize("format_", ["dense", "gguf"])
def test_another_weight_than_the_checkpoints_is_found(made, tmp_path, format_):
    export(made("4 bits"), format=format_, output=tmp_path / "out", dtype="float32")
    forms = {name: layer.stored for name, layer in compressed(checkpoint.load(made("4 bits"))).items()}
    assert _compared(FORMATS[format_], tmp_path / "out", forms).endswith("bit by bit")
    forms["model.layers.1.self_attn.q_proj"] = forms["model.layers.0.self_attn.q_proj"]
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj: .* reads weights that are off by"):
        _compared(FORMATS[format_], tmp_path / "out", forms)


@pytest.mark.parametrize(("name", "format_", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(made, tmp_path, name, format_, words):
    with pytest.raises(InputError) as refusal:
        export(made(name), format=format_, output=tmp_path / "out")
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert list(tmp_path.iterdir()) == []


def test_scales_of_inputs_and_adapters_are_refused(folder, made, tmp_path):
    original = Original(folder, torch.float32, torch.device("cpu"))
    model = original.load_all()
    from layers import statistic_of

    for name, block in zip(block_names(model), blocks(model)):
        inputs = {key: statistic_of(torch.randn(8, part.in_features)) for key, part in block.named_modules()
                  if isinstance(part, torch.nn.Linear)}  # fmt: skip
        compress_block(
            Awq(bits=None, width=4, group=32, symmetric=False, steps=2, clip=0), block, name, seed=0, statistics=inputs
        )
    checkpoint.save(model, original.tokenizer, tmp_path / "awq")
    with pytest.raises(InputError, match="q_proj: format=gptq"):
        export(tmp_path / "awq", format="gptq", output=tmp_path / "out")
    pytest.importorskip("peft")
    adapted = checkpoint.load(made("4 bits"))
    adapters.add(adapted, rank=2, alpha=4.0, seed=0)
    checkpoint.save(adapted, original.tokenizer, tmp_path / "adapted")
    with pytest.raises(InputError, match="LoRA adapters"):
        export(tmp_path / "adapted", format="dense", output=tmp_path / "out")


def test_architectures_without_a_place_in_gguf_are_refused(families, tmp_path):
    for name, words in (("opt", "not opt"), ("mistral", "windows of attention")):
        original = Original(families(name), torch.float32, torch.device("cpu"))
        model = original.load_all()
        for block_name, block in zip(block_names(model), blocks(model)):
            compress_block(METHODS["codebooks"], block, block_name, seed=0, statistics={})
        checkpoint.save(model, original.tokenizer, tmp_path / name)
        with pytest.raises(InputError, match=words):
            export(tmp_path / name, format="gguf", output=tmp_path / "out")


def test_nothing_is_overwritten_and_wrong_words_cost_a_sentence(made, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        with pytest.raises(InputError, match=f"output=.*{place}: there is something already"):
            export(made("codebooks"), format="dense", output=tmp_path / place)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="format=awq: there is no such format; allowed here: dense, gguf, vptq"):
        export(made("codebooks"), format="awq", output=tmp_path / "out")
    with pytest.raises(InputError, match="dtype=bfloat16: allowed for format=vptq: float16"):
        export(made("codebooks"), format="vptq", output=tmp_path / "out", dtype="bfloat16")
    with pytest.raises(InputError, match="no readable"):
        export(tmp_path / "full", format="dense", output=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    export(made("codebooks"), format="vptq", output=str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "config.json").is_file()


def test_the_command_writes_a_folder_and_says_what_is_lost(made, tmp_path, monkeypatch, capsys):
    from cluscomp.__main__ import main

    words = ["cluscomp", "export", str(made("codebooks")), "format=dense", f"output={tmp_path / 'dense'}"]
    monkeypatch.setattr(sys, "argv", [*words])
    main()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("lost: size: ") and out[-1] == str(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    for wrong in (words[:2], words[:3], [*words, "speed=1"]):
        monkeypatch.setattr(sys, "argv", wrong)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and "cluscomp export CHECKPOINT format=NAME" in capsys.readouterr().err


def test_every_format_is_tried_here():
    assert FORMATS.keys() == {"dense", "gguf", "vptq", "gptq", "compressed-tensors", "aqlm"}
