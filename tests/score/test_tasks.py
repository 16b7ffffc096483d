"""Tasks asked through lm-eval: the numbers of the `lm_eval` command, and what is refused before anything is asked."""

import json
import random
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers
from pipelines import pipeline
from test_checkpoint import compress
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp import checkpoint
from cluscomp.command.sweep import show
from cluscomp.errors import InputError
from cluscomp.score.answers import flipped, read_answers, write_answers
from cluscomp.score.tasks import Tasks, _manager
from cluscomp.store.records import read

pytest.importorskip("lm_eval")
PLAIN = {
    "names": ["colours"], "mean": None, "shots": None, "limit": None, "batch_size": 4, "bos": None, "max_length": None,
    "chat_template": False, "include_path": None, "data_root": None,
}  # fmt: skip
TASK = """task: colours
dataset_path: org/colours
output_type: multiple_choice
validation_split: validation
training_split: train
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """A task file of our own, and its rows in a mirror that lacks the train split."""
    place = tmp_path_factory.mktemp("mirror")
    make = random.Random(0)
    rows = [
        {"question": f"{make.choice('abcdef')} is", "choices": ["red", "green", "blue"], "answer": make.randrange(3)}
        for _ in range(12)
    ]
    folder = place / "hub" / "org" / "colours"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "tasks").mkdir()
    (place / "tasks" / "colours.yaml").write_text(TASK)
    return place


OTHERS = """task: colours_said
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
WHOLE = """task: colours_read
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
"""
IN_SHARES = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from cluscomp import ranks
from cluscomp.score.sharing import shared_out
from cluscomp.score.tasks import Tasks

folder, settings = sys.argv[1], json.loads(sys.argv[2])
model, calls = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
model.register_forward_pre_hook(lambda _model, _args: calls.append(1))
with ranks.joined("cpu"):
    asked = Tasks(**settings).ask(model, AutoTokenizer.from_pretrained(folder), shared_out)
print(json.dumps([len(calls), asked and [[(one.task, one.metric, one.value) for one in asked[0]], asked[1]]]))
"""


def starts(model, settings: Tasks, tokenizer) -> list[int]:
    """The first token of each row that a model is given when it is asked; single tokens go on with a row."""
    seen: list[int] = []

    def look(_model, args, kwargs) -> None:
        ids_BT = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.extend(ids_BT[:, 0].tolist() if ids_BT.shape[1] > 1 else [])

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    settings.ask(model, tokenizer)
    hook.remove()
    return seen


def test_bos_comes_first_also_where_the_tokenizer_adds_none(mirror, tiny_folder, tmp_path):
    """Of a given tokenizer, and of a folder's through lm-eval's own command; the tokenizer itself stays as it was."""
    from cluscomp.score import harness

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, bos_token="<eos>")
    tokenizer.pad_token, bos = None, tokenizer.bos_token_id
    assert tokenizer("a").input_ids[0] != bos
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    for wanted in (True, False, None):
        seen = starts(model, tasks(mirror, bos=wanted), tokenizer)
        assert seen and {one == bos for one in seen} == {bool(wanted)}, wanted
    assert tokenizer.pad_token is None and tokenizer("a").input_ids[0] != bos
    compressed, _ = compress(tiny_folder)
    checkpoint.save(compressed, tokenizer, tmp_path / "made")
    plain = AutoTokenizer.from_pretrained(tmp_path / "made")("a").input_ids
    for wanted, told in ((True, [bos, *plain]), (False, plain), (None, plain)):
        asked = harness.Checkpoint(str(tmp_path / "made"), dtype="float32", add_bos_token=wanted)
        assert asked.tok_encode("a") == told


@pytest.mark.slow
def test_processes_share_batches_out_and_answers_are_the_same_to_the_bit(forks, mirror, tiny_folder, tmp_path):
    """Likelihoods of choices and of whole texts, and what the model says itself."""
    shutil.copytree(mirror / "tasks", tmp_path / "tasks")
    head = (
        TASK.partition("output_type")[0].partition("\n")[2]
        + 'validation_split: validation\ndoc_to_text: "{{question}}"\n'
    )
    for name, text in (("said", OTHERS), ("read", WHOLE)):
        first, _, rest = text.partition("\n")
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"{first}\n{head}{rest}")
    names = ["colours", "colours_said", "colours_read"]
    given = PLAIN | {"names": names, "include_path": str(tmp_path / "tasks"), "data_root": str(mirror / "hub")}
    found = {}
    for world in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        logs, pids = [tmp_path / f"{rank}-of-{world}" for rank in range(world)], []
        for rank, log in enumerate(logs):
            variables = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            numbers = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} if world > 1 else {}
            arguments = str(tiny_folder), json.dumps(given)
            pids.append(forks.start(log, *arguments, variables=variables | numbers, script=IN_SHARES))
        assert [forks.wait(pid) for pid in pids] == [0] * world, [log.read_text()[-2000:] for log in logs]
        found[world] = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    ((calls, asked),), ((one, first), (two, second)) = found[1], found[2]
    assert first == asked and second is None and len(asked[1]) == 36
    assert one + two == calls and min(one, two) > calls / 4


def tasks(mirror: Path, **changes) -> Tasks:
    return Tasks(**PLAIN | {"include_path": str(mirror / "tasks"), "data_root": str(mirror / "hub")} | changes)


def test_each_own_task_file_counts_also_among_others_of_its_name(tmp_path):
    def told() -> dict:
        return Tasks(**PLAIN | {"include_path": str(tmp_path)}).describe()["own_files"]

    (tmp_path / "utils.py").write_text("a = 1\n")
    assert [*told()] == ["utils.py"]  # in a flat folder its name, as keys of earlier results have it
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "utils.py").write_text(f"name = '{name}'\n")
        (tmp_path / name / "utils.pyc").write_text("")
    before = told()
    (tmp_path / "one" / "utils.py").write_text("name = 'another'\n")
    after = told()
    assert [name for name in before if before[name] != after[name]] == ["one/utils.py"] and len(before) == 3


def test_a_task_scores_what_its_likelihoods_say(mirror, tiny_folder):
    """acc by hand: the choice whose tokens plain transformers finds the likeliest after the question."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    settings = tasks(mirror)
    settings.check(tiny_folder, tokenizer)
    (found,), answers = settings.ask(model, tokenizer)
    right = []
    for line in (mirror / "hub" / "org" / "colours" / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, sums = tokenizer(row["question"]).input_ids, []
        for choice in row["choices"]:
            ids = torch.tensor([prompt + tokenizer(" " + choice).input_ids])
            with torch.no_grad():
                log = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(float(log.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()))
        right.append(float(sums.index(max(sums)) == row["answer"]))
    assert [row["acc"] for row in sorted(answers, key=lambda row: row["doc_id"])] == right
    assert (found.task, found.metric, found.n, found.version) == ("colours", "acc", 12, 3.0)
    assert found.value == pytest.approx(sum(right) / 12)
    (part,), few = tasks(mirror, limit=5, mean="all").ask(model, tokenizer)[0][:1], tasks(mirror, limit=5)
    assert part.n == 5 and part.hash != found.hash and few.describe() != settings.describe()


def test_lm_evals_own_command_knows_a_checkpoint_and_scores_what_evaluate_does(
    mirror, tiny_folder, tmp_path, monkeypatch
):
    from lm_eval import simple_evaluate

    from cluscomp.score import harness

    checkpoint.save(*compress(tiny_folder), tmp_path / "made")
    settings = tasks(mirror)
    model, tokenizer = checkpoint.load(tmp_path / "made"), AutoTokenizer.from_pretrained(tiny_folder)
    (found,), answers = settings.ask(model, tokenizer)
    arguments = f"pretrained={tmp_path / 'made'},dtype=float32"
    manager = _manager(settings)
    results = simple_evaluate(
        harness.checkpoint.NAME, arguments, tasks=settings._load(manager), task_manager=manager, device="cpu",
        batch_size=settings.batch_size,
    )  # fmt: skip
    assert results["results"]["colours"]["acc,none"] == found.value
    theirs = [row["filtered_resps"] for row in results["samples"]["colours"]]
    assert theirs == [row["filtered_resps"] for row in answers]
    with pytest.raises(InputError, match="dtype=float99"):
        harness.Checkpoint(str(tmp_path / "made"), dtype="float99")
    others = ("peft", "delta", "subfolder", "gguf_file", "gptqmodel", "autogptq", "revision", "load_in_4bit")
    for key in others:
        with pytest.raises(InputError, match=rf"^{key}=x: has no effect on a checkpoint of cluscomp"):
            harness.Checkpoint(str(tmp_path / "made"), **{key: "x"})
    asked = []
    monkeypatch.setattr(harness.AutoTokenizer, "from_pretrained", lambda _, **more: asked.append(more) or tokenizer)
    harness.Checkpoint.create_from_arg_string(
        f"{arguments},revision=main,use_fast_tokenizer=False,trust_remote_code=False", {"device": "cpu"}
    )
    assert asked == [{"use_fast": False, "trust_remote_code": False}]


def test_rows_count_by_what_they_say_not_by_where_they_lie(mirror, tmp_path):
    """The same rows elsewhere have the same hash; one other answer, or examples of another split, another."""
    known = tasks(mirror).rows()
    shutil.copytree(mirror / "hub", tmp_path / "hub")
    assert tasks(mirror, data_root=str(tmp_path / "hub")).rows() == known
    shutil.copytree(mirror / "hub", tmp_path / "other")
    file = tmp_path / "other" / "org" / "colours" / "validation.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[3])
    file.write_text("\n".join([*lines[:3], json.dumps(row | {"answer": (row["answer"] + 1) % 3}), *lines[4:]]))
    assert tasks(mirror, data_root=str(tmp_path / "other")).rows() != known
    for name, rows in (("one", lines[:4]), ("two", lines[4:8])):
        shutil.copytree(tmp_path / "hub", tmp_path / name)
        (tmp_path / name / "org" / "colours" / "train.jsonl").write_text("\n".join(rows))
    one, two = (tasks(mirror, data_root=str(tmp_path / name), shots=2).rows() for name in ("one", "two"))
    assert len({one, two, known}) == 3
    assert tasks(mirror, data_root=str(tmp_path / "one"), shots=0).rows() == known  # no examples, so they do not count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["colour"]}, ["'colour'", "near:", "colours"]),
        ({"include_path": "/nowhere"}, ["tasks.include_path=/nowhere"]),
        ({"data_root": "/nowhere"}, ["'colours'", "/nowhere/org/colours"]),
        ({"shots": 2}, ["needs split 'train'", "only validation"]),
        ({"bos": True}, ["tasks.bos=true", "no BOS token"]),
        ({"chat_template": True}, ["tasks.chat_template=true"]),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_sentence(mirror, tiny_folder, changes, words):
    settings = tasks(mirror, **changes)
    with pytest.raises(InputError) as caught:
        settings.check(tiny_folder, AutoTokenizer.from_pretrained(tiny_folder))
        settings.rows()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_refused_beforehand(mirror, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no end token"):
        tasks(mirror).check(tiny_folder, tokenizer)
    tasks(mirror, names=[]).check(tiny_folder, tokenizer)


def test_answers_that_leave_no_room_for_a_prompt_are_refused_beforehand(mirror, tiny_folder, tmp_path):
    """lm-eval would fail only after the first model was asked. A task's own number counts, or lm-eval's 256."""
    head = TASK.partition("output_type")[0].partition("\n")[2]
    rest = f'{head}validation_split: validation\ndoc_to_text: "{{{{question}}}}"\n' + OTHERS.partition("\n")[2]
    for name, text in (("few", rest), ("many", rest.replace("  max_gen_toks: 3\n", ""))):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    (tmp_path / "others.yaml").write_text("task: others\n" + rest.replace("max_gen_toks: 3", "max_new_tokens: 70"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def check(positions: int | None, **changes) -> None:
        tasks(mirror, include_path=str(tmp_path), **changes).check(tiny_folder, tokenizer, positions)

    check(64, names=["few"])
    check(64, names=["few"], max_length=4)
    check(None, names=["few", "many"])
    check(257, names=["few", "many"])
    for name, count in (("many", 256), ("others", 70)):
        told = f"'{name}' generates up to {count} tokens .* but {tiny_folder.name} has 64 positions"
        with pytest.raises(InputError, match=told):
            check(64, names=["few", name])
    with pytest.raises(InputError, match=r"tasks\.max_length=3: 'few' generates up to 3 tokens .*, so none is left"):
        check(64, names=["few"], max_length=3)
    with pytest.raises(InputError, match=r"tasks\.max_length=256: 'many' generates up to 256 tokens"):
        check(1024, names=["few", "many"], max_length=256)


def test_examples_that_lm_eval_would_not_show_are_refused(mirror, tiny_folder, tmp_path):
    (tmp_path / "bare.yaml").write_text(TASK.replace("task: colours", "task: bare") + "num_fewshot: 0\n")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [bare]\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for shots in (0, None):
        tasks(mirror, names=["both"], include_path=str(tmp_path), shots=shots).check(tiny_folder, tokenizer)
    told = r"tasks\.shots=2: 'bare' has no examples by its own config; give tasks\.shots=null for it"
    for name in ("bare", "both"):
        with pytest.raises(InputError, match=told):
            tasks(mirror, names=[name], include_path=str(tmp_path), shots=2).check(tiny_folder, tokenizer)


def test_flips_by_hand(tmp_path):
    def rows(*right: float):
        return [{"task": "t", "filter": "none", "doc_id": number, "acc": one} for number, one in enumerate(right)]

    assert flipped(rows(1.0, 0.0, 1.0, 0.0), rows(1.0, 1.0, 0.0, 0.0)) == {"t": (2, 4)}
    assert flipped(rows(1.0, 0.0), rows(1.0, 0.0)) == {"t": (0, 2)}
    before, after = ([*one, *({**row, "filter": "other"} for row in one)] for one in (rows(1.0, 0.0), rows(1.0, 1.0)))
    assert flipped(before, after) == {"t": (1, 2)}  # a question counts once
    others = [row | {"task": "u"} for row in rows(1.0, 0.0)]
    for one, two in ((0.25, 1.0), (1.0, 0.25), (0.25, 0.5)):  # acc is a probability, as that of truthfulqa_mc2
        assert flipped([*rows(one, 1.0), *others], [*rows(two, 1.0), *others]) == {"u": (0, 2)}
    write_answers(tmp_path / "a.gz", rows(1.0, 0.0))
    assert read_answers(tmp_path / "a.gz") == rows(1.0, 0.0)


def test_a_run_keeps_scores_flips_and_answers_beside_its_record(mirror, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Row {number} of a text that says little." for number in range(40)))
    command = [
        "model=tiny", "data=text", f"data.file={tmp_path / 'text.txt'}", "method=cluscomp_data_free",
        "method.vector_dim=4", "method.codebook_size=16", "evaluate.context=32", "evaluate.limit=2",
        "tasks.names=[colours]", f"tasks.include_path={mirror / 'tasks'}", f"data_root={mirror / 'hub'}",
        f"outputs={tmp_path / 'outputs'}", f"cache={tmp_path / 'cache'}", "tasks.limit=10",
    ]  # fmt: skip
    outcome = pipeline(*command)
    record = read(outcome.path)
    found = {(row.after, row.metric): row for row in record.scores if row.dataset == "colours"}
    assert set(found) == {("original", "acc"), ("cluster", "acc"), ("cluster", "flipped")}
    protocol = found["cluster", "acc"].protocol
    assert protocol == found["original", "acc"].protocol == found["cluster", "flipped"].protocol
    assert protocol["partial"] is True and protocol["limit"] == 10 and protocol["task_version"] == 3.0
    before, after = (read_answers(outcome.path.parent / f"answers-{name}.jsonl.gz") for name in ("original", "cluster"))
    assert len(before) == len(after) == found["cluster", "flipped"].n == 10
    flips = sum(one["acc"] != other["acc"] for one, other in zip(before, after))
    assert found["cluster", "flipped"].value == flips / 10
    show(outcome)
    shown = capsys.readouterr().out
    assert "colours acc (partial)" in shown and f"{found['cluster', 'acc'].value:.3f} ± " in shown
    assert "partial: measured on the first windows or rows only" in shown


def test_images_are_asked_about_through_the_models_processor(tmp_path, tiny_folder):
    """A model that sees answers greedily what transformers' own generate does; one that does not is refused."""
    from datasets import Dataset
    from PIL import Image

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sight = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", "vocab_size": 264, "initializer_range": 0.3, "eos_token_id": 0} | text,
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4} | sight,
        image_token_id=257, image_grid_pinpoints=[[8, 8]], image_seq_length=4,
    )  # fmt: skip
    folder = tmp_path / "seeing"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "image_grid_pinpoints": [[8, 8]]}
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(**sizes), tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    pictures = [Image.new("RGB", (8, 8), (40 * number, 90, 200)) for number in range(3)]
    (tmp_path / "hub" / "org" / "pictures").mkdir(parents=True)
    rows = {"question": ["what", "which", "who"], "picture": pictures, "answer": ["a", "b", "c"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "hub" / "org" / "pictures" / "validation-0.parquet")
    (tmp_path / "tasks").mkdir()
    task = TASK.replace("colours", "pictures").replace("multiple_choice", "generate_until")
    task = task.replace("training_split: train\n", "").replace("doc_to_choice: choices", "doc_to_image: [picture]")
    task = task.replace("{{question}}", "<image>{{question}}").replace("- metric: acc", "- metric: exact_match")
    (tmp_path / "tasks" / "pictures.yaml").write_text(task + "generation_kwargs: {max_gen_toks: 4, until: []}\n")
    settings = tasks(tmp_path, names=["pictures"], batch_size=1)
    with pytest.raises(InputError, match=r"tasks.mean=all: .* which none of pictures has; give tasks.mean=null"):
        tasks(tmp_path, names=["pictures"], mean="all").check(folder, tokenizer)
    settings.check(folder, tokenizer)
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    (found, *_), answers = settings.ask(model, tokenizer)
    assert (found.task, found.metric, found.n) == ("pictures", "exact_match", 3)
    for row, question, picture in zip(answers, rows["question"], pictures):
        inputs = processor(images=[picture], text=f"<image>{question}", return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["filtered_resps"] == [processor.decode(made, skip_special_tokens=True)]
    assert settings.ask(model, tokenizer)[0][0].hash == found.hash
    processor.tokenizer.bos_token = "<eos>"
    processor.save_pretrained(folder)
    for wanted in (True, False):
        seen = starts(model, tasks(tmp_path, names=["pictures"], batch_size=1, bos=wanted), tokenizer)
        assert len(seen) == 3 and {one == processor.tokenizer.bos_token_id for one in seen} == {wanted}
    with pytest.raises(InputError, match=r"asks about images, but the model of .* sees none"):
        settings.check(tiny_folder, tokenizer)
    (folder / "processor_config.json").write_text('{"processor_class": "LlavaNextProcessor"}')
    with pytest.raises(InputError, match=r"asks about images, but the processor of .* fails: "):
        settings.check(folder, tokenizer)
