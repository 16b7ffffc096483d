"""Models that are already quantised are scored as they are, against the run or the dense numbers they come from."""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pipelines import composed, pipeline
from safetensors.torch import load_file, save_file

from cluscomp.errors import InputError
from cluscomp.forms.linear import compressed
from cluscomp.models.original import blocks, linears
from cluscomp.models.quantised import Quantised, opened
from cluscomp.models.walk import Walk
from cluscomp.report import page
from cluscomp.report.comparison import perplexity_table
from cluscomp.report.names import model_name
from cluscomp.report.pareto import pareto
from cluscomp.runs.preparation import planned
from cluscomp.store.records import read

HOW = ["method=cluscomp_data_free", "method.vector_dim=4", "method.codebook_size=16"]
CPU = torch.device("cpu")
GROUP = 16  # of 4-bit integers with one scale
BLOCK = 128  # of the FP8 format, one scale each; larger than the tiny matrices


@pytest.fixture(scope="module")
def command(ground) -> list[str]:
    return [
        "data=text", f"data.file={ground / 'text.txt'}", "evaluate.context=32", "evaluate.limit=3",
        f"outputs={ground / 'outputs'}", f"cache={ground / 'cache'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compressing(command):
    """A run that leaves a checkpoint."""
    return pipeline("model=tiny", *command, *HOW)


@pytest.fixture(scope="module")
def fp8(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A folder in the FP8 format of transformers, and a dense one with the numbers it stands for."""
    place = tmp_path_factory.mktemp("fp8")
    stored, dense = {}, {}
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        stored[name] = dense[name] = tensor
        if ".layers." in name and tensor.ndim == 2:
            scale = tensor.abs().amax() / 448
            stored[name], stored[f"{name}_scale_inv"] = (tensor / scale).to(torch.float8_e4m3fn), scale.view(1, 1)
            dense[name] = stored[name].float() * scale
    for folder, tensors in ((place / "fp8", stored), (place / "dense", dense)):
        shutil.copytree(tiny_folder, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return claimed(place / "fp8", quant_method="fp8", weight_block_size=[BLOCK, BLOCK]), place / "dense"


@pytest.fixture(scope="module")
def packed(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A folder with 4-bit integers in the packed format of compressed-tensors, and a dense one with their numbers."""
    pytest.importorskip("compressed_tensors")
    place = tmp_path_factory.mktemp("packed")
    stored, dense = {}, {}
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        stored[name] = dense[name] = tensor
        if ".layers." in name and tensor.ndim == 2:
            groups = tensor.unflatten(1, (-1, GROUP))
            scales = groups.abs().amax(-1) / 7.5
            integers = (groups / scales[..., None]).round().clamp(-8, 7)
            dense[name] = (integers * scales[..., None]).flatten(1)
            shifted = (integers.long() + 8).flatten(1).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
            del stored[name]
            stored[f"{name}_packed"] = shifted.sum(-1).to(torch.uint32).view(torch.int32)
            stored[f"{name}_scale"], stored[f"{name}_shape"] = scales, torch.tensor(tensor.shape)
    for folder, tensors in ((place / "packed", stored), (place / "dense", dense)):
        shutil.copytree(tiny_folder, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return claimed(
        place / "packed", quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed",
        ignore=["lm_head"], config_groups=groups,
    ), place / "dense"  # fmt: skip


def claimed(folder: Path, **quantization_config) -> Path:
    """The folder, its config now saying that it is quantised."""
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scored(folder: Path, command: list[str], *more: str):
    return pipeline("model=hub", f"model.id={folder}", *command, "order=[evaluate]", *more)


def test_our_checkpoint_scores_as_in_the_run_that_made_it(compressing, command):
    """The same bits of every score, the same size; its weights stay codes."""
    record = read(scored(compressing.checkpoint, command, "evaluate.prompt=The", "evaluate.distance=true").path)
    made = compressing.record
    found = {(row.dataset, row.metric): row.value for row in record.scores}
    for row in made.scores:
        assert row.after == "original" or found[row.dataset, row.metric] == row.value
    assert found["text", "kl"] == 0 and found["text", "top1_agreement"] == 1
    assert record.size["original"] == {key: value for key, value in made.size.items() if key != "original"}
    original = opened(compressing.checkpoint, torch.float32, CPU, to_score=True)
    assert compressed(original.model()) and not any(map(linears, blocks(original.model())))
    assert original.load_all() is original.model()


@pytest.mark.parametrize("which", ["fp8", "packed"])
def test_another_quantizers_model_scores_as_the_dense_numbers_it_stands_for(which, command, request):
    folder, dense = request.getfixturevalue(which)
    assert scored(folder, command).record.scores == scored(dense, command).record.scores


def test_bits_of_another_quantizers_model_by_hand(fp8):
    """8 bits a weight and 32 for each matrix's one scale; embedding and norms in 32 bits."""
    original = opened(fp8[0], torch.float32, CPU, to_score=True)
    layers = [layer for block in blocks(original.model()) for layer in linears(block).values()]
    weights = sum(layer.weight.numel() for layer in layers)
    kept = sum(p.numel() for p in original.model().parameters()) - weights
    size = original.size()
    assert size["linear_bits_per_weight"] == pytest.approx(8 + 32 * len(layers) / weights)
    whole = (8 * weights + 32 * len(layers) + 32 * kept) / (weights + kept)
    assert size["model_bits_per_weight"] == pytest.approx(whole)
    assert size["checkpoint_bytes"] == (fp8[0] / "model.safetensors").stat().st_size


def test_bits_of_packed_integers_by_hand(packed):
    """4 bits a weight, 32 for each group's scale, and 2 x 64 for each matrix's shape."""
    original = opened(packed[1], torch.float32, CPU, to_score=True)
    layers = [layer for block in blocks(original.load_all()) for layer in linears(block).values()]
    weights = sum(layer.weight.numel() for layer in layers)
    found = opened(packed[0], torch.float32, CPU, to_score=True).size()["linear_bits_per_weight"]
    assert found == pytest.approx(4 + 32 / GROUP + 128 * len(layers) / weights)


def test_where_a_linear_layer_has_no_tensors_of_its_own_the_bits_are_those_of_the_file(fp8, tmp_path):
    folder = shutil.copytree(fp8[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(".0.mlp.up_proj.", ".0.mlp.fused."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    original = opened(folder, torch.float32, CPU, to_score=True)
    assert original._counted()["linear_bits_per_weight"] == original._counted()["model_bits_per_weight"]
    with pytest.raises(InputError, match=r"no tensor model.layers.0.mlp.up_proj.weight"):
        original.model()


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="the package that must be missing is installed")
@pytest.mark.parametrize(("method", "words"), [("gptq", ["'gptq'"]), ("awq", ["'awq'", "pip install gptqmodel"])])
def test_a_missing_package_is_named(tiny_folder, tmp_path, command, method, words):
    folder = claimed(Path(shutil.copytree(tiny_folder, tmp_path / "model")), quant_method=method, bits=4, group_size=32)
    with pytest.raises(InputError) as caught:
        scored(folder, command)
    assert all(word in str(caught.value) for word in [str(folder), *words]) and "\n" not in str(caught.value)


def test_a_quantizer_that_transformers_does_not_know_is_told(tiny_folder, tmp_path, command):
    folder = claimed(Path(shutil.copytree(tiny_folder, tmp_path / "model")), quant_method="nobodys")
    with pytest.raises(InputError, match="'nobodys'"):
        scored(folder, command)


@pytest.mark.parametrize("which", ["ours", "other"])
def test_what_is_quantised_is_not_compressed(compressing, fp8, command, which):
    folder = compressing.checkpoint if which == "ours" else fp8[0]
    for order in ("[cluster]", "[cluster,evaluate]"):
        with pytest.raises(InputError, match=f"{folder}: this model is already quantised; give the original"):
            pipeline("model=hub", f"model.id={folder}", *command, *HOW, f"order={order}")
    assert not isinstance(opened(fp8[1], torch.float32, CPU, to_score=True), Quantised)


def test_the_plan_of_our_checkpoint_counts_its_codes(compressing, fp8, command):
    """The stored layers of the outline are those of the file; another quantizer's are not known."""
    plan = planned(composed("model=hub", f"model.id={compressing.checkpoint}", *command, "order=[evaluate]"))
    size = compressing.record.size
    assert plan.size.linear_bits_per_weight == size["linear_bits_per_weight"] and not plan.exact
    assert [row.name for row in plan.rows] == ["evaluate original"]
    with pytest.raises(InputError, match="what layers of 'fp8' take is not known"):
        planned(composed("model=hub", f"model.id={fp8[0]}", *command, "order=[evaluate]"))


def test_blocks_stay_in_memory(compressing, ids):
    original = opened(compressing.checkpoint, torch.float32, CPU, to_score=True)
    model = original.model()
    with torch.no_grad():
        logits = model(ids).logits
    walk = Walk(model, original)
    assert torch.equal(walk.logits(walk.through([ids], "test")[0], ids), logits)


LEDGER = {"codes": 3 * 1000, "scales": 500}


@pytest.fixture
def stated(tiny_folder, tmp_path) -> Path:
    """A dense folder that says what the numbers it stands for take."""
    folder = shutil.copytree(tiny_folder, tmp_path / "stated")
    said = {"method": "gptq", "library": "some library 1.0", "ledger": LEDGER}
    (folder / "stored_bits.json").write_text(json.dumps(said))
    return folder


def test_a_dequantised_folder_scores_as_what_it_is_and_counts_as_it_says(stated, tiny_folder, command):
    record, dense = (read(scored(folder, command).path) for folder in (stated, tiny_folder))
    assert [row.value for row in record.scores] == [row.value for row in dense.scores]
    tensors = load_file(stated / "model.safetensors")
    inside = sum(t.numel() for name, t in tensors.items() if ".layers." in name and t.ndim == 2)
    numbers = sum(t.numel() for t in tensors.values())
    size = record.size["original"]
    assert size["linear_bits_per_weight"] == 3500 / inside
    assert size["model_bits_per_weight"] == (3500 + 16 * (numbers - inside)) / numbers
    assert size["checkpoint_bytes"] == math.ceil((3500 + 16 * (numbers - inside)) / 8)
    said = {
        "method": "gptq", "library": "some library 1.0", "ledger": LEDGER, "original": None, "calibration": None,
    }  # fmt: skip
    assert size["stated"] == said == record.stages["external"]["found"]


def test_a_dequantised_folder_stands_in_tables_beside_the_methods_of_its_original(stated, compressing, command):
    said = json.loads((stated / "stored_bits.json").read_text()) | {"original": model_name(compressing.record, [])}
    (stated / "stored_bits.json").write_text(json.dumps(said))
    record = read(scored(stated, command).path)
    assert {score.after for score in record.scores} == {"external"}
    both = [compressing.record, record]
    table = perplexity_table(both).set_index("method")
    bits = round(record.size["original"]["linear_bits_per_weight"], 3)
    row = table.loc["GPTQ (some library 1.0, external)"]
    assert row["stored bits"] == bits and row["limit"] == f"{bits:.3g}" and len(table) == 3
    assert table["model"].nunique() == 1 and set(pareto(both)["method"]) == set(table.index) - {"original"}
    assert "those its maker states" in page.page("both", both, "md")["tables.md"]


def test_a_dequantised_folder_is_not_compressed(stated, command):
    with pytest.raises(InputError, match=r"stored_bits\.json it is quantised already.*order=\[evaluate\]"):
        pipeline("model=hub", f"model.id={stated}", *command, *HOW)


@pytest.mark.parametrize(
    "text, words",
    [
        ("3 bits", r"stored_bits\.json: the file: .*JSON"),
        ('{"method": "gptq", "library": "x"}', r"ledger: Field required"),
        ('{"method": "gptq", "library": "x", "ledger": {"codes": "3"}}', r"ledger\.codes: .*integer"),
        ('{"method": "gptq", "library": "x", "ledger": {"codes": 0}}', r"0 bits in all for \d+ weights"),
        ('{"method": "gptq", "library": "x", "ledger": {"codes": 1000000000}}', r"at most 16 each"),
    ],
)
def test_what_a_folder_cannot_mean_is_told(stated, command, text, words):
    (stated / "stored_bits.json").write_text(text)
    with pytest.raises(InputError, match=words):
        scored(stated, command)
