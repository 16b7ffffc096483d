"""Stage finetune: templates and labels by hand, codebooks, LoRA and the original trained, stored and loaded again."""

import copy
import json
import random
from pathlib import Path

import pipelines
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp import checkpoint
from cluscomp.data.instructions import Plain, Rows, Tokens
from cluscomp.errors import InputError
from cluscomp.forms import adapters
from cluscomp.forms.layers import size_of
from cluscomp.forms.linear import compressed
from cluscomp.forms.normal_float import NormalFloatWeight
from cluscomp.models.original import Original
from cluscomp.runs.preparation import planned
from cluscomp.runs.run import Outcome
from cluscomp.train.objective import IGNORED
from cluscomp.train.on_answers import Answers, with_adapters

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def ground(ground):
    """With a task that can be learned: the answer repeats the last letter."""
    make = random.Random(0)
    letters = ["".join(make.choices("abc", k=make.randint(2, 9))) for _ in range(64)]
    rows = [{"instruction": word, "input": "", "output": word[-1] * 6} for word in letters]
    (ground / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ground


def overrides(ground: Path, *more: str) -> list[str]:
    return [
        "model=tiny", "data=text", f"data.file={ground / 'text.txt'}", f"cache={ground / 'cache'}",
        f"outputs={ground / 'outputs'}", "method.vector_dim=4", "method.codebook_size=32", "evaluate.context=32",
        "evaluate.limit=4", "order=[cluster,finetune]", "evaluate.after=[finetune]", "instructions=alpaca",
        "instructions.id=null", f"instructions.file={ground / 'task.jsonl'}", "finetune.length=256",
        "finetune.epochs=2", "finetune.held_out=16", "finetune.batch_size=4", "finetune.accumulation=2",
        "finetune.lr=3e-3", *more,
    ]  # fmt: skip


def built(ground: Path, *more: str):
    return pipelines.composed(*overrides(ground, *more))


def pipeline(ground: Path, *more: str) -> Outcome:
    return pipelines.pipeline(*overrides(ground, *more))


def found(outcome: Outcome) -> dict:
    return outcome.record.stages["finetune"]["found"]


@pytest.fixture(scope="module")
def tuned(ground) -> Outcome:
    """Codebooks trained on the task."""
    return pipeline(ground)


@pytest.fixture(scope="module")
def adapted(ground) -> Outcome:
    """LoRA trained on the task."""
    return pipeline(ground, "finetune=lora", "finetune.rank=4")


@pytest.fixture(scope="module")
def tiny(ground) -> Original:
    """What was compressed and finetuned."""
    return Original(built(ground).model.folder(ground / "cache"), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(tuned):
    return AutoTokenizer.from_pretrained(tuned.checkpoint)


def rows(tmp_path: Path, content: list[dict], form: str) -> Rows:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    return Rows(name="rows", format=form, file=str(path), id=None, config=None, split="train", data_root=None)


def parts(tokens: Tokens, tokenizer) -> list[tuple[str, bool]]:
    """Runs of tokens that count or not, as text."""
    runs: list[tuple[list[int], bool]] = []
    for token, counts in zip(tokens.ids, tokens.counted):
        if not runs or runs[-1][1] != counts:
            runs.append(([], counts))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), counts) for ids, counts in runs]


# examples


def test_alpaca_rows_take_stanfords_templates(tokenizer, tmp_path):
    content = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
    ]
    first, second = rows(tmp_path, content, "alpaca").encode(tokenizer, 400).examples
    assert parts(first, tokenizer) == [
        (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
            "### Response:",
            False,
        ),
        ("3<eos>", True),
    ]
    assert parts(second, tokenizer) == [
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nSay hello.\n\n### Response:",
            False,
        ),
        ("hello<eos>", True),
    ]


def test_gsm8k_rows_take_the_prompt_of_the_papers_code(tokenizer, tmp_path):
    row = {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
    (one,) = rows(tmp_path, [row], "gsm8k").encode(tokenizer, 200).examples
    assert parts(one, tokenizer) == [
        ("1 + 1?\nFirst think step by step and then answer the final number.\n", False),
        ("It is <<1+1=2>>2.\nThe final answer is: 2<eos>", True),
    ]


def test_prompt_and_completion_stand_as_they_are(tokenizer, tmp_path):
    row = {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " 2"}
    (one,) = rows(tmp_path, [row], "prompt_completion").encode(tokenizer, 200).examples
    assert parts(one, tokenizer) == [("Question: 1 + 1?\nAnswer:", False), (" 2<eos>", True)]


def test_of_conversations_what_the_assistant_says_counts(tokenizer, tmp_path):
    said = [("system", "be"), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    source = rows(tmp_path, [{"messages": [{"role": r, "content": c} for r, c in said]}], "messages")
    with pytest.raises(InputError, match="no chat template"):
        source.encode(tokenizer, 100)
    chatty = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = CHAT
    (one,) = source.encode(chatty, 100).examples
    assert parts(one, chatty) == [
        ("<system>be</><user>a?</><assistant>", False), ("b</>", True),
        ("<user>c?</><assistant>", False), ("d</>", True),
    ]  # fmt: skip
    opened = [{"role": "assistant", "content": "hello"}, *({"role": r, "content": c} for r, c in said[1:3])]
    (one,) = rows(tmp_path, [{"messages": opened}], "messages").encode(chatty, 100).examples
    assert parts(one, chatty) == [("<assistant>hello</><user>a?</><assistant>", False), ("b</>", True)]
    chatty.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}")
    with pytest.raises(InputError, match="rewrites earlier turns"):
        source.encode(chatty, 100)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.nothing.at.all }}", "{% for m in %}", "{{ 1 // 0 }}"]
)
def test_a_chat_template_that_cannot_be_used_is_told(tokenizer, tmp_path, template):
    """One that reaches for attributes, for what is not there, is broken, or fails."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    source = rows(tmp_path, [{"messages": [{"role": "user", "content": "a?"}]}], "messages")
    with pytest.raises(InputError, match="row 0 is refused by the chat template: "):
        source.encode(chatty, 100)


def test_what_is_too_long_is_cut_counted_and_left_out_if_no_answer_remains(tokenizer, tmp_path):
    content = [{"question": "q" * size, "answer": "a" * 10} for size in (1, 30, 200)]
    encoded = rows(tmp_path, content, "gsm8k").encode(tokenizer, 100)
    assert [len(one.ids) for one in encoded.examples] == [1 + 60 + 11, 100]
    assert (encoded.truncated, encoded.dropped) == (2, 1)
    assert sum(encoded.examples[1].counted) == 100 - 30 - 60


def test_plain_text_is_cut_into_windows_that_count(ground, tokenizer):
    data = built(ground).stages["recover"].data
    encoded = Plain(name="text", data=data).encode(tokenizer, 32)
    ids = tokenizer("\n\n".join(data.text("calibration").rows)).input_ids
    assert [one.ids for one in encoded.examples] == [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    assert all(all(one.counted) for one in encoded.examples)


def test_labels_stand_on_the_answer_alone(ground, tokenizer):
    row = Answers([Tokens([5, 6, 7, 8], [False, False, True, True])])[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 8] and row["labels"].tolist() == [IGNORED, 7, 8, IGNORED]


@pytest.mark.parametrize("choice", ["gsm8k", "alpaca"])
def test_sets_of_the_hub_come_from_a_mirror(shared, tokenizer, choice):
    name = {"gsm8k": "openai/gsm8k", "alpaca": "tatsu-lab/alpaca-subset"}[choice]
    config = {"gsm8k": "main", "alpaca": None}[choice]
    source = Rows(
        name=choice, format=choice, file=None, id=name, config=config, split="train",
        data_root=str(shared / "data" / "hub"),
    )  # fmt: skip
    encoded = source.encode(tokenizer, 512)
    assert len(encoded.examples) + encoded.dropped == {"gsm8k": 7473, "alpaca": 2050}[choice]
    assert source.fingerprint() == source.fingerprint()


def test_unusable_rows_are_told(ground, tmp_path, tokenizer):
    with pytest.raises(InputError, match="row 0 is not of format 'alpaca'"):
        rows(tmp_path, [{"question": "?"}], "alpaca").encode(tokenizer, 9)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content or '' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    good, asked = {"role": "assistant", "content": "y"}, {"role": "user", "content": "x"}
    for row, format_, words in (
        ({"prompt": "Say b:", "completion": None}, "prompt_completion", "'completion' is null, no text"),
        ({"prompt": "2+3=", "completion": 5}, "prompt_completion", "'completion' is 5, no text"),
        ({"instruction": None, "output": "b"}, "alpaca", "'instruction' is null, no text"),
        ({"question": ["a"], "answer": "b"}, "gsm8k", "'question' is .*, no text"),
        ({"messages": [asked, good | {"content": None}]}, "messages", "'content' is null, no text"),
        ({"messages": [asked | {"content": 3}, good]}, "messages", "'content' is 3, no text"),
        ({"messages": []}, "messages", "is not of format 'messages' .*empty conversation"),
        ({"messages": [asked | {"role": "system"}, good]}, "messages", "refused by the chat template: no system role"),
    ):
        with pytest.raises(InputError, match=f"row 0 .*{words}"):
            rows(tmp_path, [row], format_).encode(tokenizer, 64)
    called = [asked, good | {"content": None, "tool_calls": []}, asked, good]
    called[1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert len(rows(tmp_path, [{"messages": called}], "messages").encode(tokenizer, 64).examples) == 1
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json"):
        Rows(
            name="x", format="alpaca", file=str(tmp_path / "broken.json"), id=None, config=None, split="train",
            data_root=None,
        ).fingerprint()  # fmt: skip
    with pytest.raises(InputError, match="either"):
        built(ground, "instructions.id=tatsu-lab/alpaca")
    with pytest.raises(InputError, match="too few for"):
        pipeline(ground, "finetune.held_out=63")
    with pytest.raises(InputError, match="examples=3 and a step of 8"):
        pipeline(ground, "finetune.examples=3")


def test_at_most_so_many_examples_are_trained_on_and_the_same_are_held_out(ground):
    original = Original(built(ground).model.folder(ground / "cache"), torch.float32, torch.device("cpu"))
    stages = [built(ground, f"finetune.examples={number}").stages["finetune"] for number in ("null", "16")]
    (_, train, held_out), (_, fewer, same) = (stage._examples(original.tokenizer, seed=3) for stage in stages)
    assert same == held_out and len(held_out) == 16 and not any(one in fewer for one in held_out)
    assert len(fewer) == 2 * 16 and len({tuple(one.ids) for one in fewer}) <= 16 < len(
        {tuple(one.ids) for one in train}
    )


# training


def test_codebooks_learn_the_task_and_nothing_else_changes(tuned, ground):
    numbers = found(tuned)
    assert numbers["held_out_after"] < 0.8 * numbers["held_out_before"] and numbers["kept"]
    assert (numbers["examples"], numbers["truncated"], numbers["dropped"], numbers["steps"]) == (64, 0, 0, 12)
    clustered = next(tuned.checkpoint.parents[1].glob("cluster-*/checkpoint"))
    before, after = (load_file(folder / "model.safetensors") for folder in (clustered, tuned.checkpoint))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "codebooks" in name
    }
    size = tuned.record.stages["finetune"]["size"]
    assert numbers["deployed_bytes"] == sum(size["ledger"].values()) // 8 < size["checkpoint_bytes"]
    assert numbers["trained_parameters"] == 3 * 7 * 32 * 4


def held_out(ground: Path, folder: Path) -> list[Tokens]:
    stage = built(ground).stages["finetune"]
    encoded = stage.instructions.encode(AutoTokenizer.from_pretrained(folder), stage.length).examples
    return random.Random(0).sample(encoded, len(encoded))[: stage.held_out]


@pytest.mark.parametrize("which", ["tuned", "adapted"])
def test_the_held_out_loss_is_that_of_the_stored_model_by_plain_transformers(which, ground, request):
    outcome = request.getfixturevalue(which)
    model = AutoModelForCausalLM.from_pretrained(outcome.checkpoint, dtype=torch.float32)
    total = count = 0
    with torch.no_grad():
        for one in held_out(ground, outcome.checkpoint):
            logits = model(torch.tensor([one.ids])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(one.ids[1:]), reduction="none")
            counted = torch.tensor(one.counted[1:])
            total, count = total + float(losses[counted].sum()), count + int(counted.sum())
    assert found(outcome)["held_out_after"] == pytest.approx(total / count, rel=1e-5)


def test_lora_learns_and_leaves_the_model_below_as_it_was(adapted, tuned):
    numbers = found(adapted)
    assert numbers["held_out_after"] < 0.8 * numbers["held_out_before"]
    assert numbers["held_out_before"] == found(tuned)["held_out_before"]  # adapters begin at nothing
    clustered = next(adapted.checkpoint.parents[1].glob("cluster-*/checkpoint"))
    before, after = (load_file(folder / "model.safetensors") for folder in (clustered, adapted.checkpoint))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    sides = {"q": 64 + 64, "k": 64 + 32, "v": 64 + 32, "o": 64 + 64, "up": 64 + 96, "gate": 64 + 96, "down": 96 + 64}
    assert numbers["trained_parameters"] == 3 * 4 * sum(sides.values())


def test_adapters_are_stored_as_peft_stores_them_counted_and_hashed(adapted, tmp_path):
    folder = adapted.checkpoint / adapters.FOLDER
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype.itemsize for tensor in tensors.values()} == {2}
    bits = 16 * found(adapted)["trained_parameters"]
    assert sum(tensor.numel() for tensor in tensors.values()) * 16 == bits
    ledger = adapted.record.stages["finetune"]["size"]["ledger"]
    assert ledger["adapters"] == bits
    size = adapted.record.stages["finetune"]["size"]
    assert size["checkpoint_bytes"] == sum(path.stat().st_size for path in adapted.checkpoint.rglob("*.safetensors"))
    assert size["linear_bits_per_weight"] == adapted.record.stages["cluster"]["size"]["linear_bits_per_weight"]
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    loaded = checkpoint.load(adapted.checkpoint)
    assert len(adapters.parameters(loaded)) == 2 * len(compressed(loaded))
    assert size_of(loaded).ledger == ledger
    checkpoint.save(loaded, AutoTokenizer.from_pretrained(adapted.checkpoint), tmp_path / "again")
    assert checkpoint.checkpoint_hash(tmp_path / "again") == checkpoint.checkpoint_hash(adapted.checkpoint)
    (tmp_path / "again" / adapters.FOLDER / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="altered"):
        checkpoint.load(tmp_path / "again")


def test_adapters_begin_at_exactly_the_models_logits(tuned, ids):
    model = checkpoint.load(tuned.checkpoint)
    before = model(ids).logits
    adapters.add(model, rank=3, alpha=6.0, seed=0)
    assert len(adapters.parameters(model)) == 2 * len(compressed(model)) > 0
    assert torch.equal(model(ids).logits, before)
    for name, parameter in adapters.parameters(model).items():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    assert not torch.equal(model(ids).logits, before)


def test_adapters_can_begin_with_what_compression_left_out(tuned, tiny):
    """LoftQ: of each layer the error that its rank can take, the best there is; of a full rank all of it."""
    for rank in (4, 64):
        model = checkpoint.load(next(tuned.checkpoint.parents[1].glob("cluster-*/checkpoint")))
        before = {name: layer.stored(torch.float32) for name, layer in compressed(model).items()}
        with_adapters(model, norms_too=False, rank=rank, alpha=6.0, dense=tiny, seed=0)
        for full, dense_OI in tiny.tensors([f"{name}.weight" for name in before]):
            layer = model.get_submodule(name := full.removesuffix(".weight"))
            found_OI = before[name] + layer.get_delta_weight("default")
            tail = torch.linalg.svdvals(dense_OI - before[name])[rank:].square().sum()
            torch.testing.assert_close((dense_OI - found_OI).square().sum(), tail, rtol=1e-3, atol=1e-6)
            sizes = [matrix.square().sum() for matrix in (layer.lora_A.default.weight, layer.lora_B.default.weight)]
            if rank == 4:  # 64 is more than some layers have, and what is left over begins at zero
                torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-6)


def test_qlora_is_lora_over_nf4(ground, adapted):
    given = [one for one in overrides(ground) if not one.startswith("method.")]
    lora = ["method=nf4", "finetune=lora", "finetune.rank=4", "finetune.start=loftq"]
    outcome = pipelines.pipeline(*given, *lora)
    assert found(outcome)["held_out_after"] < 0.8 * found(outcome)["held_out_before"]
    assert found(outcome)["trained_parameters"] == found(adapted)["trained_parameters"]
    assert {type(layer.stored) for layer in compressed(checkpoint.load(outcome.checkpoint)).values()} == {
        NormalFloatWeight
    }
    whole = planned(pipelines.composed(*given, *lora))
    below = planned(pipelines.composed(*given, *lora, "order=[cluster]", "evaluate.after=[cluster]"))
    file = outcome.checkpoint / adapters.FOLDER / "adapter_model.safetensors"
    assert whole.checkpoint_bytes - below.checkpoint_bytes == file.stat().st_size
    bits, added = sum(below.size.ledger.values()), 16 * found(outcome)["trained_parameters"]
    assert whole.size.ledger == below.size.ledger | {"adapters": added}
    more = whole.size.model_bits_per_weight / below.size.model_bits_per_weight
    assert more == pytest.approx((bits + added) / bits)


def test_the_original_is_finetuned_whole_to_compare_with(ground, tmp_path):
    outcome = pipeline(ground, "finetune=full", "order=[finetune]", "finetune.lr=1e-3")
    numbers = found(outcome)
    assert numbers["held_out_after"] < 0.8 * numbers["held_out_before"]
    model = checkpoint.load(outcome.checkpoint)
    assert numbers["trained_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert outcome.record.size["model_bits_per_weight"] == 16
    assert not compressed(model) and outcome.record.scores[0].after == "finetune"


def test_full_finetuning_in_16_bits_takes_the_same_small_steps(ground):
    """Of float32 masters: most steps of this length are less than half of the distance between numbers of 16 bits."""
    losses = {
        dtype: found(pipeline(ground, "finetune=full", "order=[finetune]", "finetune.lr=2e-4", f"dtype={dtype}"))
        for dtype in ("float32", "bfloat16", "float16")
    }
    gains = {dtype: one["held_out_before"] - one["held_out_after"] for dtype, one in losses.items()}
    assert gains == pytest.approx(dict.fromkeys(gains, gains["float32"]), rel=0.1)


def test_an_adapted_model_continues_a_prompt_and_is_evaluated(adapted):
    assert {score.after for score in adapted.record.scores} == {"finetune"}
    model = checkpoint.load(adapted.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(adapted.checkpoint)
    made = model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] >= 3


def test_a_finetuning_that_diverges_is_taken_back(ground, tuned):
    outcome = pipeline(ground, "finetune.lr=1e30", "finetune.norms=true")
    assert not found(outcome)["kept"] and len(found(outcome)["attempts"]) == 3
    stages = outcome.record.stages
    assert stages["finetune"]["checkpoint_hash"] == stages["cluster"]["checkpoint_hash"]
