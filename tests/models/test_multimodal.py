"""Models that also see images: their language part is compressed, all else stays, and the whole is saved."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as known
from pipelines import composed, pipeline
from safetensors.torch import load_file
from streamed import opened, streamed_logits

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.formats.export import export
from cluscomp.forms.linear import compressed
from cluscomp.models.original import linears, norms
from cluscomp.models.sources import read_config
from cluscomp.plan.meta import MetaModel
from cluscomp.runs.preparation import planned

IMAGE, BEGIN = 256, 254  # tokens: a place of an image, and what stands before it
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 257,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SIGHT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN = {
    "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "image_token_id": IMAGE, "vision_start_token_id": BEGIN, "vision_end_token_id": 253, "video_token_id": 255,
}  # fmt: skip
CONFIGS = {
    "LlavaNextForConditionalGeneration": known.LlavaNextConfig(
        text_config={"model_type": "llama"} | TEXT, image_token_id=IMAGE, image_seq_length=4,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16} | SIGHT,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8]],
    ),
    "Qwen2VLForConditionalGeneration": known.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        **QWEN,
    ),
    "Qwen2_5_VLForConditionalGeneration": known.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        **QWEN,
    ),
    "Gemma3ForConditionalGeneration": known.Gemma3Config(
        text_config=TEXT | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={"model_type": "siglip_vision_model"} | SIGHT, image_token_index=IMAGE, mm_tokens_per_image=4,
        boi_token_index=BEGIN, eoi_token_index=255,
    ),
}  # fmt: skip


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    """A prompt with one image, as each family's processor makes it."""
    make = torch.Generator().manual_seed(1)
    places, pixels = 4, torch.randn(1, 3, 8, 8, generator=make)
    if name.startswith("Llava"):  # the whole image, and one tile of it with an end of each row
        places, more = 10, {"pixel_values": torch.randn(1, 2, 3, 8, 8, generator=make), "image_sizes": [[8, 8]]}
    elif name.startswith("Gemma"):
        more = {"pixel_values": pixels}
    else:
        more = {"pixel_values": torch.randn(16, 96, generator=make), "image_grid_thw": [[1, 4, 4]]}
    ids = torch.tensor([[5, 7, BEGIN, *[IMAGE] * places, 30, 31, 32]])
    kinds = {"Q": "mm_token_type_ids", "G": "token_type_ids"}
    more |= {kinds[name[0]]: (ids == IMAGE).int()} if name[0] in kinds else {}
    return {"input_ids": ids} | {key: torch.as_tensor(value) for key, value in more.items()}


@pytest.fixture(scope="module", params=CONFIGS)
def seeing(request, tmp_path_factory, tiny_folder) -> SimpleNamespace:
    """A tiny model that sees images, and transformers' own logits of text and of a prompt with an image."""
    name, folder = request.param, tmp_path_factory.mktemp("seeing")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(known, name)(CONFIGS[name]).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
                parameter.data = parameter.to(torch.bfloat16).float()
    model.save_pretrained(folder)
    for path in tiny_folder.glob("token*"):
        shutil.copy(path, folder)
    (folder / "preprocessor_config.json").write_text('{"size": 8}')
    plain = known.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids, inputs = torch.arange(1, 25).reshape(2, 12) * 10 % 250, image_inputs(name)
    with torch.no_grad():
        text, image = plain(ids).logits, plain(**inputs).logits
        other = plain(**inputs | {"pixel_values": 2 * inputs["pixel_values"]}).logits
    assert not torch.allclose(image, other, atol=1e-3)  # the image counts
    return SimpleNamespace(name=name, folder=folder, plain=plain, ids=ids, inputs=inputs, text=text, image=image)


@torch.no_grad()
def test_the_original_gives_transformers_logits_of_text_and_images_and_is_planned(seeing):
    original = opened(seeing.folder)
    assert torch.allclose(streamed_logits(original, seeing.ids), seeing.text, rtol=1e-4, atol=1e-5)
    whole = original.load_all()
    assert type(whole).__name__ == seeing.name
    assert torch.equal(whole(**seeing.inputs).logits, seeing.image)
    assert all("vision" not in name and "visual" not in name and "projector" not in name for name in norms(whole))
    outline = MetaModel(known.AutoConfig.from_pretrained(seeing.folder), torch.float32, "cpu")
    assert [set(places) for places in outline.places()] == [set(linears(outline.block))] * 2
    assert outline.all_numbers == sum(one.numel() for one in {id(p): p for p in whole.parameters()}.values())


def test_all_stages_leave_the_whole_model_with_its_parts_for_images(seeing, ground, tmp_path):
    more = ["recover", "finetune"] if seeing.name.startswith(("Llava", "Gemma")) else []
    stages = [*(["round"] if "2_5" in seeing.name else []), "cluster", "block_finetune", *more]
    settings = [
        "model=hub", f"model.id={seeing.folder}", "data=text", f"data.file={ground / 'text.txt'}",
        f"outputs={tmp_path / 'outputs'}", f"cache={tmp_path / 'cache'}", "method.vector_dim=4",
        "method.codebook_size=16", f"order=[{','.join(stages)}]", "cluster.samples=2",
        "cluster.length=32", "block_finetune=quick", "block_finetune.samples=4", "block_finetune.length=32",
        "block_finetune.epochs=1", "recover=quick", "recover.tokens=256", "recover.length=32", "recover.batch_size=2",
        "recover.held_out=2", "recover.norms=true", "finetune.length=32", "finetune.examples=4", "finetune.held_out=2",
        "finetune.batch_size=2", "finetune.epochs=1", "evaluate.context=32", "evaluate.limit=4",
    ]  # fmt: skip
    outcome = pipeline(*settings)
    folder = outcome.checkpoint
    assert (folder / "preprocessor_config.json").read_text() == '{"size": 8}'
    assert "AutoModelForImageTextToText.from_pretrained" in (folder / "README.md").read_text()
    model = known.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == seeing.name and compressed(model)
    assert all("language_model" in name for name in compressed(model))
    files, after = load_file(seeing.folder / "model.safetensors"), load_file(folder / "model.safetensors")
    sight = [name for name in model.state_dict() if "language_model" not in name and "lm_head" not in name]
    own, there = seeing.plain.state_dict(), model.state_dict()
    assert sight and all(torch.equal(own[name], there[name]) for name in sight)
    assert all(after[name].dtype == torch.bfloat16 for name in sight if name in after)
    record, numbers = outcome.record, sum(one.numel() for one in files.values())
    kept = numbers - sum(layer.in_features * layer.out_features for layer in compressed(model).values())
    assert record.size["model_bits_per_weight"] * numbers == pytest.approx(
        record.size["linear_bits_per_weight"] * (numbers - kept) + 16 * kept, rel=0.01
    )
    for dense in outcome.checkpoint.parents[1].glob("round-*/checkpoint"):
        rounded = known.AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32).state_dict()
        assert all(torch.equal(own[name], rounded[name]) for name in sight)
        assert (dense / "preprocessor_config.json").is_file()
    score = next(row for row in record.scores if row.after == "cluster" and row.metric == "perplexity")
    assert 1 < score.value < 1e4
    with torch.no_grad():
        found = model(**seeing.inputs).logits
        assert not torch.allclose(found, seeing.image, atol=1e-3)
        length = seeing.inputs["input_ids"].shape[1]
        assert model.generate(**seeing.inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == length + 3
        whole = known.AutoModelForImageTextToText.from_pretrained(seeing.folder, dtype=torch.float32).eval()
        loaded = checkpoint.load(folder, torch.float32)
        for name, tensor in loaded.dequantize().state_dict().items():
            whole.state_dict()[name].copy_(tensor)  # the original with the weights that were compressed
        assert torch.allclose(whole(**seeing.inputs).logits, found, rtol=1e-4, atol=1e-4)
        if seeing.name.startswith("Llava"):
            export(folder, format="dense", output=tmp_path / "dense", dtype="float32")
            again = known.AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
            assert torch.allclose(again(**seeing.inputs).logits, found, rtol=1e-4, atol=1e-4)
            assert (tmp_path / "dense" / "preprocessor_config.json").is_file()
            own = pipeline("model=hub", f"model.id={folder}", *settings[2:6], *settings[-2:], "order=[evaluate]")
            last = [row.value for row in record.scores if row.after == record.scores[-1].after]
            assert [row.value for row in own.record.scores] == pytest.approx(last)


def test_a_model_of_an_unknown_kind_is_refused_in_a_sentence(tmp_path):
    """One that hears, one whose text has an encoder."""
    for config in (known.Qwen2AudioConfig(), known.Florence2Config()):
        config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"is no causal language model.*AutoModelForImageTextToText$"):
            read_config(tmp_path)


def test_the_papers_model_is_planned_without_its_files():
    shape = ["method.vector_dim=9", "method.codebook_size=50000", "order=[cluster]", "evaluate=none"]
    found = planned(composed("experiment=paper_multimodal", "machine=a6000", *shape))
    assert 2.0 < found.size.linear_bits_per_weight < 2.02 < found.size.model_bits_per_weight < 5
