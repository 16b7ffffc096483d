"""Evaluation settings against windows and scores made plainly here, and what they refuse before any work."""

import random
from pathlib import Path

import pytest
import torch
from pipelines import composed, pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp.errors import InputError
from cluscomp.models.original import Original
from cluscomp.models.sources import TinyModel
from cluscomp.plan.meta import MetaModel
from cluscomp.report.tables import stage_table
from cluscomp.store.records import read

SMALL = ["bits=3", "model=tiny", "data=text", "evaluate.context=32", "evaluate.limit=3", "evaluate.batch_size=2"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with two texts."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(["first.txt", "second.txt"]):
        make = random.Random(seed)
        rows = [" ".join("".join(make.choices("abcdefgh", k=5)) for _ in range(12)) for _ in range(60)]
        (folder / name).write_text("\n\n".join(rows))
    return folder


def evaluate(ground: Path, *overrides: str):
    return composed(*SMALL, f"data.file={ground / 'first.txt'}", *overrides).evaluate


def scores(settings, model, original: Original, after: str, kept: Path) -> list:
    """Of a model that no stage has changed, so that nothing was learned from."""
    return settings.evaluate(model, original, after, {}, kept, seed=0).scores


def opened(folder: Path) -> Original:
    return Original(folder, torch.float32, torch.device("cpu"))


def with_bos(folder: Path, copy: Path) -> Path:
    """A copy of a tiny model whose tokenizer has a BOS token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<eos>")
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    return copy


def test_several_texts_are_scored_each_under_its_name(ground, tiny_folder):
    second = ["+data@evaluate.texts.other=text", f"evaluate.texts.other.file={ground / 'second.txt'}"]
    original = opened(tiny_folder)
    both = evaluate(ground, *second, "evaluate.texts.other.name=other")
    rows = scores(both, original, original, "original", ground)
    assert [(row.dataset, row.metric) for row in rows] == [
        ("text", "perplexity"), ("text", "bits_per_byte"), ("other", "perplexity"), ("other", "bits_per_byte"),
    ]  # fmt: skip
    alone = scores(evaluate(ground), original, original, "original", ground)
    assert rows[:2] == alone and rows[2].value != rows[0].value
    with pytest.raises(InputError, match="texts: two of them are named 'text'"):
        evaluate(ground, *second)


def test_bos_takes_the_place_of_every_windows_first_token(ground, tiny_folder, tmp_path):
    """The score is that of plain transformers on windows put together by hand."""
    folder = with_bos(tiny_folder, tmp_path / "model")
    original = opened(folder)
    row = scores(evaluate(ground, "evaluate.bos=true"), original, original, "original", ground)[0]
    text = (ground / "first.txt").read_text().split("\n\n")[48:]  # the last fifth
    ids = torch.tensor(original.tokenizer("\n\n".join(text)).input_ids)[:96].view(3, 32)
    ids[:, 0] = original.tokenizer.bos_token_id
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        loss = sum(float(model(window[None], labels=window[None]).loss) for window in ids) / 3
    assert row.value == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert row.protocol["every_window_starts_with_bos"] is True and row.protocol["starts_with_bos"] is True


def test_a_tokenizer_without_bos_is_refused(ground, tiny_folder):
    with pytest.raises(InputError, match=r"evaluate.bos=true: the tokenizer of .* has no BOS token"):
        evaluate(ground, "evaluate.bos=true").check(opened(tiny_folder))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 1}),
        ("mamba", {"hidden_size": 32, "state_size": 4, "time_step_rank": 4, "num_hidden_layers": 1}),
    ],
)
def test_a_model_that_names_no_longest_window_wants_a_number(ground, tmp_path, family, config):
    original = opened(TinyModel(architecture=family, config=config, seed=0).folder(tmp_path))
    outline = MetaModel(original.config, torch.float32, "cpu")
    told = r"evaluate\.context=null: this model names no longest window; give a number of tokens"
    for look in (lambda settings: settings.check(original), lambda settings: settings.cost(outline)):
        with pytest.raises(InputError, match=told):
            look(evaluate(ground, "evaluate.context=null"))
        look(evaluate(ground))
    assert scores(evaluate(ground), original, original, "original", tmp_path)[0].protocol["context"] == 32
    tasks_alone = composed("bits=3", "model=tiny", "evaluate=none", "evaluate.context=null").evaluate
    assert tasks_alone.cost(outline).device["embedding, head"] > 0


@pytest.mark.parametrize(("preset", "context"), [("gptq_2048", 2048), ("aqlm_4096", 4096), ("aqlm_8192", 8192)])
def test_presets_score_wikitext2_and_c4_at_the_papers_context(preset, context):
    settings = composed("bits=3", f"evaluate={preset}").evaluate
    assert settings.context == context and settings.limit is None
    assert {source.id: source.test for source in settings.texts.values()} == {
        "Salesforce/wikitext": "test", "allenai/c4": "validation",
    }  # fmt: skip


def test_wikitext2_and_the_c4_sample_come_from_a_mirror(shared, tiny_folder):
    original = opened(tiny_folder)
    settings = composed(
        "bits=3", f"data_root={shared / 'data' / 'hub'}", "evaluate=gptq_2048", "data@evaluate.texts.c4=c4_sample",
        "evaluate.context=32", "evaluate.limit=2",
    ).evaluate  # fmt: skip
    settings.check(original)
    assert [source.text("test").name for source in settings.texts.values()] == [
        "Salesforce/wikitext/test", "allenai/c4-sample/validation",
    ]  # fmt: skip


def test_the_original_is_no_distance_from_itself_and_another_model_some(ground, tiny_folder, families, tmp_path):
    """KL and agreement against plain transformers logits; the original in memory has 0 and 1 exactly."""
    original, other = opened(tiny_folder), opened(families("llama", tie_word_embeddings=True, rope_theta=50.0))
    settings = evaluate(ground, "evaluate.distance=true")

    def measured(model, after) -> dict[str, float]:
        return {row.metric: row.value for row in scores(settings, model, original, after, tmp_path)}

    itself = measured(original, "original")
    assert itself["kl"] == 0.0 and itself["top1_agreement"] == 1.0
    assert measured(original.load_all(), "cluster") == itself  # its blocks walked, not read from disk
    found = measured(other.load_all(), "cluster")
    text = (ground / "first.txt").read_text().split("\n\n")[48:]
    ids = torch.tensor(original.tokenizer("\n\n".join(text)).input_ids)[:96].view(3, 32)
    plain = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[:, :-1].double().log_softmax(-1)
        for folder in (original.folder, other.folder)
    ]
    kl = torch.nn.functional.kl_div(plain[1], plain[0], reduction="sum", log_target=True) / (3 * 31)
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-4) and found["kl"] > 1e-3
    agreement = (plain[0].argmax(-1) == plain[1].argmax(-1)).double().mean().item()
    assert found["top1_agreement"] == pytest.approx(agreement) and agreement < 1
    assert found["perplexity"] != itself["perplexity"]


def test_what_the_original_predicts_is_kept_and_a_damaged_part_made_anew(ground, tiny_folder, tmp_path, caplog):
    original, settings = opened(tiny_folder), evaluate(ground, "evaluate.distance=true")
    first = scores(settings, original, original, "original", tmp_path)
    (part,) = tmp_path.rglob("*.safetensors")
    written = part.stat().st_mtime_ns
    assert scores(settings, original, original, "original", tmp_path) == first
    assert part.stat().st_mtime_ns == written
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert scores(settings, original, original, "original", tmp_path) == first
    assert "damaged" in caplog.text and part.stat().st_mtime_ns != written


def test_a_plain_model_is_scored_as_it_is(ground, tiny_folder, tmp_path):
    """With the scores that the original has in a run that goes on to compress it."""
    command = [
        "model=hub", f"model.id={tiny_folder}", *SMALL[2:], f"data.file={ground / 'first.txt'}", f"outputs={tmp_path}",
        f"cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    how = ["method=cluscomp_data_free", "method.vector_dim=4", "method.codebook_size=16"]
    outcome = pipeline(*command, "order=[evaluate]")
    record = read(outcome.path)
    assert outcome.checkpoint is None and record.stages == {} and record.config["order"] == []
    table = stage_table([record])
    assert list(table["after"]) == ["original"] and list(table["bits per weight, model"]) != ["16.000", "16.000"]
    longer = read(pipeline(*command, *how, "order=[cluster,evaluate]").path)
    assert [row for row in longer.scores if row.after == "original"] == record.scores
    assert [row.after for row in longer.scores][-1] == "cluster"
    with pytest.raises(InputError, match=r"order.*order=\[evaluate\]"):
        composed(*command, *how, "order=[]")


def test_the_first_process_alone_loads_all_blocks_to_continue_a_prompt(ground, tiny_folder, tmp_path, monkeypatch):
    loaded, whole = [], Original.load_all
    monkeypatch.setattr(Original, "load_all", lambda original: loaded.append(original) or whole(original))
    settings = evaluate(ground, "evaluate.prompt=The", "evaluate.prompt_tokens=2")
    for rank, count in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        original = opened(tiny_folder)
        found = settings.evaluate(original, original, "original", {}, tmp_path, seed=0)
        assert len(loaded) == count and (found.sample is not None) == bool(count) and found.scores


def test_a_prompt_that_cannot_be_continued_is_refused_beforehand(ground, tiny_folder):
    """Of no token, or with what is to come longer than the model."""
    original = opened(tiny_folder)
    tokens = len(original.tokenizer("The capital").input_ids)
    with pytest.raises(InputError, match=r"evaluate\.prompt='': the tokenizer of .* makes 0 tokens of it"):
        evaluate(ground, "evaluate.prompt=''").check(original)
    evaluate(ground, "evaluate.prompt='The capital'", f"evaluate.prompt_tokens={64 - tokens}").check(original)
    told = rf"evaluate\.prompt_tokens=60: .* {tokens} tokens {tokens + 60} in all, but .* has 64 positions; give "
    with pytest.raises(InputError, match=rf"{told}evaluate\.prompt_tokens={64 - tokens} or less"):
        evaluate(ground, "evaluate.prompt='The capital'", "evaluate.prompt_tokens=60").check(original)
    with pytest.raises(InputError, match=r"give a shorter evaluate\.prompt$"):
        evaluate(ground, f"evaluate.prompt='{'The capital ' * 20}'").check(original)
