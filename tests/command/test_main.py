"""The command as a user meets it: exit codes, the one sentence on stderr, how soon it comes, and what it leaves.

What does not depend on start-up runs within this process, which has torch loaded already.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import torch
import yaml
from forks import until
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import cluscomp
from cluscomp.command import usage
from cluscomp.command.compose import CONF, composed
from cluscomp.command.idle import tell_idle
from cluscomp.command.trust import given
from cluscomp.errors import InputError
from cluscomp.runs import preparation

PARAGRAPH = "Paragraph {} says that the quick brown fox jumped over the lazy dog {} times."
TINY = [
    "model=tiny", "model.config.num_hidden_layers=1", "data=text", "data.file=text.txt", "method.vector_dim=4",
    "method.codebook_size=16",
    "evaluate.context=32", "evaluate.limit=2", "cluster.samples=4", "cluster.length=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path, cache, monkeypatch) -> Path:
    """The folder in which the command is given; it holds text.txt alone."""
    (tmp_path / "text.txt").write_text("\n\n".join(PARAGRAPH.format(i, 7 * i) for i in range(60)))
    monkeypatch.setenv("CLUSCOMP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(place, monkeypatch, capfd, caplog):
    """The same within this process, which has torch loaded already."""
    from cluscomp.__main__ import main

    def run(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["cluscomp", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        caplog.clear()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=caplog.text + err)

    return run


def the_sentence(done: SimpleNamespace, code: int = 2) -> str:
    """What a refused command says in the last line on stderr; only progress may precede it."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    lines = done.err.strip().splitlines()
    assert lines[-1].startswith("cluscomp: ")
    assert len(lines[-1]) < 600
    return lines[-1]


SETTINGS = {
    "wrong key": (["bits=3", "sede=1"], ["sede", "did you mean seed", "allowed"]),
    "wrong key of a group": (
        ["bits=3", "block_finetune.lrr=1"],
        ["block_finetune.lrr", "block_finetune.lr?", "epochs"],
    ),
    "wrong key of a chosen option": (
        ["bits=3", "model=tiny", "model.architecure=opt"],
        ["model.architecure", "mean model.architecture"],
    ),
    "added key": (["bits=3", "+speed=1"], ["speed"]),
    "wrong type": (["bits=3", "seed=first"], ["seed", "'first'", "integer"]),
    "float for an integer": (["bits=3", "block_finetune.epochs=1.5"], ["block_finetune.epochs", "1.5", "integer"]),
    "null for a number": (["bits=3", "block_finetune.lr=null"], ["block_finetune.lr", "None", "number"]),
    "bits over 8": (["bits=9"], ["bits", "9", "8"]),
    "bits under 1": (["bits=0.5"], ["bits", "0.5", "1"]),
    "bits that are no number": (["bits=nan"], ["bits", "nan"]),
    "bits that are a word": (["bits=few"], ["bits", "'few'", "number"]),
    "negative seed": (["bits=3", "seed=-1"], ["seed", "-1", "0"]),
    "learning rate of 0": (["bits=3", "block_finetune.lr=0"], ["block_finetune.lr", "0"]),
    "wrong choice": (["bits=3", "method.axis=up"], ["method.axis", "'up'", "'out' or 'in'"]),
    "wrong option of a group": (["bits=3", "model=gpt9"], ["model", "gpt9", "llama2_7b", "tiny"]),
    "wrong experiment": (["experiment=demon"], ["experiment", "demon", "mean demo", "paper"]),
    "no group": (["bits=3", "block_finetune=null"], ["block_finetune"]),
    "a model of the hub for a choice": (
        ["bits=3", "model=meta-llama/Llama-2-7b-hf"],
        ["model=hub model.id=meta-llama/Llama-2-7b-hf"],
    ),
    "a folder for a choice": (["bits=3", "model=/tmp"], ["model=hub model.id=/tmp"]),
    "a file for a choice": (["bits=3", f"data={__file__}"], [f"data=text data.file={__file__}"]),
    "a setting of another choice": (["bits=3", "model.id=a/b"], ["model.id", "it is one of model=hub"]),
    "one stage without brackets": (["bits=3", "order=cluster"], ["order=[cluster]"]),
    "no choice to list": (["list", "method", "gtpq"], ["gtpq", "gptq"]),
    "a word that is no command": (["tabel", "x"], ["tabel", "did you mean table?", "key=value"]),
    "help of what is no command": (["help", "plott"], ["plott", "did you mean plot?"]),
    "choices of no group": (["list", "methods"], ["list methods", "method, model"]),
    "a sweeper that is not installed": (["-m", "bits=3", "hydra/sweeper=optuna"], ["pip install 'cluscomp[search]'"]),
    "a model folder that is not there": (
        ["bits=3", "model=hub", "model.id=/no/model"],
        ["model.id=/no/model", "no such"],
    ),
    "a list for a group": (["bits=3", "machine=[-1,-1]"], ["machine=[-1,-1]", "name of a choice"]),
    "a dictionary for a group": (["bits=3", "data={a:1}"], ["data={a:1}", "name of a choice"]),
    "a word for a group": (["bits=3", "model=tiny", "evaluate.texts=pydoc"], ["evaluate.texts", "pydoc"]),
    "missing bits": ([], ["bits=3", "method.vector_dim"]),
    "half a shape": (["method.vector_dim=4"], ["bits=3", "method.codebook_size"]),
    "bits and a shape": (["bits=3", "method.vector_dim=4"], ["bits=3", "method.vector_dim", "4"]),
    "unknown stage": (["bits=3", "order=[cluster,recoverr]"], ["order", "'recoverr'", "block_finetune, cluster"]),
    "no stage": (["bits=3", "order=[]"], ["order"]),
    "a stage twice": (["bits=3", "order=[cluster,cluster]"], ["order", "cluster"]),
    "a stage too early": (["bits=3", "order=[block_finetune]"], ["order", "block_finetune"]),
    "unknown stage to measure": (["bits=3", "evaluate.after=[tune]"], ["evaluate.after", "'tune'", "cluster"]),
    "mandatory id": (["bits=3", "model=hub"], ["model.id"]),
    "mandatory file": (["bits=3", "data=text"], ["data.file"]),
    "no outputs": (["bits=3", "outputs=null"], ["outputs", "None", "string"]),
    "an objective that nothing measures": (["bits=3", "objective=nonsense"], ["objective", "'nonsense'", "perplexity"]),
    "a data_root that is not there": (["bits=3", "data_root=/nowhere"], ["data_root=/nowhere", "no such folder"]),
    "a seed of 65 bits": (["bits=3", f"seed={2**64}"], ["seed", str(2**64)]),
    "a name with a slash": (["bits=3", "name=a/b"], ["name", "a/b"]),
    "broken syntax": (["bits=3", "order=[cluster"], ["[cluster"]),
    "no order": (["bits=3", "order=null"], ["order = None", "order=[cluster]"]),
    "an equals sign in a path": (["bits=3", "model=hub", "model.id=a/epoch=3"], ["\"model.id='a/epoch=3'\""]),
}


@pytest.mark.parametrize(("arguments", "named"), SETTINGS.values(), ids=SETTINGS)
def test_a_wrong_setting_costs_one_sentence(cli, arguments, named):
    done = cli(*arguments)
    sentence = the_sentence(done)
    assert done.err.count("\n") == 1 and done.out == ""
    assert not sentence.startswith("cluscomp: :") and "object at 0x" not in sentence
    for part in named:
        assert part in sentence, sentence


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_what_torchrun_would_not_set_is_named(cli, monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    assert f"{name}=abc" in the_sentence(cli(*TINY))


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "1"},
    ],
)
def test_a_sweep_is_started_by_one_process(cli, place, monkeypatch, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that what is set meanwhile goes with the test
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "hydra.launcher.tasks_per_node=N" in the_sentence(cli("-m", *TINY, "seed=0,1"))
    assert not list(place.glob("outputs/*"))


def test_settings_are_checked_before_what_takes_long_is_imported(place):
    script = """
import sys
from cluscomp.__main__ import main
for arguments in (["bits=99"], ["bits=3", "order=[x]"], ["bits=3", "sede=1"], ["--help"]):
    sys.argv = ["cluscomp", *arguments]
    try:
        main()
    except SystemExit:
        print([name for name in ("torch", "transformers", "datasets", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines().count("[]") == 4, done.stdout + done.stderr
    assert done.stderr.count("cluscomp: ") == 3


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_teaches(cli, arguments):
    done = cli(*arguments)
    assert done.code == 0 and done.err == ""
    for part in ("Examples", "cluscomp experiment=demo", "Groups", "model: ", "smollm2_135m", "Results", "record.json"):
        assert part in done.out, part
    assert "$CONFIG" not in done.out and "${hydra" not in done.out


def test_each_command_has_its_help_and_each_group_its_choices(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for command in ("plan", "status", "collect", "table", "plot", "verify", "list", "help"):
        for arguments in ([command, "--help"], ["help", command]):
            done = cli(*arguments)
            assert done.code == 0 and done.out.startswith(f"Usage:  cluscomp {command} "), arguments
            assert max(map(len, done.out.splitlines())) <= 120, arguments
    assert cli("help").out == cli("--help").out
    for command, told in usage.COMMANDS.items():  # all of them there, too, as their own help says it
        assert f"\n  cluscomp {command} {told.partition(chr(10))[0]}\n" in cli("--help").out, command
    assert "\nmethod: aqlm, " in cli("list").out
    assert re.search(r"^rtn +Round to nearest", cli("list", "method").out, re.M)
    assert "act_order: true        # inputs of large mean square first" in cli("list", "method", "gptq").out


def test_help_and_lists_fit_a_narrow_terminal(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    of_method = ["list", "method"], ["list", "method", "gptq"]
    for arguments in (["list"], *of_method, ["table", "--help"], ["plan", "--help"], ["--help"]):
        told = cli(*arguments).out
        assert max(map(len, told.splitlines())) <= 80, arguments
    assert yaml.safe_load(cli("list", "method", "gptq").out)["act_order"] is True  # as it was, comments apart
    assert "[into=FILE]" in cli("table", "--help").out and "paper_zeroshot" in cli("list").out


def test_a_choice_is_listed_with_all_its_settings_each_with_its_word(cli):
    best = cli("list", "method", "cluscomp_best").out
    assert "\nfloor: 0.5             # with fill the share" in best and "\nstates: 8   " in best  # of two other yamls
    assert best.endswith("# cluster=by_loss\n# allocation=model\n") and "defaults" not in best
    quick = cli("list", "recover", "quick").out
    assert "\ntokens: 65536          # of training" in quick and "\nteacher_top: 64 " in quick
    assert "# data@evaluate.texts.c4=c4" in cli("list", "evaluate", "gptq_2048").out


@pytest.mark.parametrize("group", ["method", "cluster", "block_finetune", "recover", "finetune", "evaluate", "data"])
def test_what_is_listed_of_a_choice_is_what_is_run(group):
    """But for what it chooses of other groups, which may stand in it (data.parts)."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for path in CONF.glob(f"{group}/*.yaml"):
            listed = yaml.safe_load(usage.choices(CONF, group, path.stem))
            run = OmegaConf.to_container(hydra.compose("config", overrides=[f"{group}={path.stem}"]))[group]
            inside = {key for key, value in listed.items() if value in ({}, {"data": "${oc.select:scored,${data}}"})}
            assert {key: run[key] for key in listed.keys() & run.keys() - inside} == {
                key: value for key, value in listed.items() if key in run and key not in inside
            }, path
            assert run.keys() - listed.keys() == set(), path


def test_help_tells_each_setting_in_no_group(cli):
    told = cli("--help").out
    assert "bits: null                   # most stored bits" in told and "\nshard: false " in told
    assert '${oc.env:CLUSCOMP_CACHE,"~/.cache/cluscomp"}' in told


def test_a_wrong_setting_beside_a_folder_of_ones_own_costs_one_sentence(cli, place):
    (place / "mine" / "method").mkdir(parents=True)
    (place / "mine" / "method" / "mine.yaml").write_text((CONF / "method" / "rtn.yaml").read_text())
    done = cli("--config-dir", "mine", "model=tiny", "method=mine", "bitz=3")
    assert "bitz: there is no such setting; did you mean bits?" in the_sentence(done)


def test_what_has_no_effect_is_told(cli, caplog):
    done = cli("plan", "model=tiny", "bits=3", "recover.lr=1e-3", "block_finetune=quick", "cluster=corrected")
    assert done.code == 0
    assert [line for line in caplog.messages if "no effect" in line] == [
        "block_finetune has no effect: order=[cluster] has no stage block_finetune",
        "recover.lr has no effect: order=[cluster] has no stage recover",
    ]


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        (["evaluate=gptq_2048", "data@scored=pydoc", "instructions=alpaca"], ["data@scored", "instructions"]),
        (["order=[rank,cut]", "method=rtn", "beside.rank=2"], ["beside.rank", "bits", "method"]),
        (["order=[evaluate]", "data=pydoc"], ["bits"]),
        (["data=own", "data@scored=pydoc", "order=[cluster,finetune]", "instructions=text", "tasks=none"], []),
        (["order=[rank,cut]", "cut=by_method", "method=rtn", "data@scored=pydoc"], []),
        (["+data@recover.data=pydoc"], ["data@recover.data"]),
    ],
)
def test_a_group_that_no_stage_takes_is_told(caplog, settings, idle):
    arguments = ["model=tiny", "bits=5", *settings]
    experiment = composed(arguments)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        raw = OmegaConf.to_container(hydra.compose("config", overrides=arguments))
    tell_idle(raw, experiment, given(arguments))
    assert [line.partition(" ")[0] for line in caplog.messages if "no effect" in line] == idle


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        (["method=slim"], "beside=none"),
        (["method=rtn", "beside.rank=2"], "beside=none"),
        (["method=cluscomp_best"], "allocation=block"),
        (["method=rtn", "allocation=opq"], "allocation=block"),
    ],
)
def test_what_cut_does_not_do_is_refused(settings, instead):
    cut = ["model=tiny", "bits=5", "order=[rank,cut]", "cut=by_method", *settings]
    with pytest.raises(InputError, match=f"cut=by_method .*{instead}"):
        composed(cut)
    kept = [item for item in cut if not item.startswith("beside.")]
    assert composed([item for item in kept if not item.startswith("allocation")] + [instead]).order == ["rank", "cut"]


def test_each_choice_says_in_a_whole_sentence_what_it_is():
    for path in (path for path in CONF.glob("*/*.yaml") if path.parent.name != "hydra"):
        sentence = usage.said(path)
        assert len(sentence) > 12 and not sentence.endswith((",", ";", "(")), path
        assert sentence.count("(") == sentence.count(")") and "for plans without it" not in sentence, path


def test_a_reader_that_has_had_enough_is_no_failure(place):
    command = f"set -o pipefail; {sys.executable} -m cluscomp --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("cluscomp: compress") and done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_checkpoint_in_the_place_of_a_record_is_told(cli, place):
    (place / "checkpoint").mkdir()
    assert "checkpoint is a folder; RECORD is a record's file, outputs/run-KEY/record.json" in the_sentence(
        cli("verify", "checkpoint")
    )


def test_version(cli):
    assert cli("--version").out.strip() == cluscomp.__version__


def test_settings_can_be_shown_without_a_run(cli, place):
    done = cli("bits=3", "--cfg", "job", "--resolve")
    assert done.code == 0 and "_target_: cluscomp.stages.cluster.Cluster" in done.out
    assert [path.name for path in place.iterdir()] == ["text.txt"]


def test_debug_shows_the_traceback(forks):
    for value in ("true", "True"):
        done = forks.run("bits=99", f"debug={value}")
        assert done.returncode != 0 and "Traceback" in done.stderr and "InputError" in done.stderr


@pytest.mark.parametrize("key", ["outputs", "cache", "publish"])
def test_a_place_that_cannot_be_written_is_named_by_its_key(cli, place, key):
    (place / "file").touch()
    done = cli(*TINY, f"{key}=file/below")
    assert f"{key}=file/below" in the_sentence(done)
    assert "block" not in done.err  # it is told before the work, not after


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_says_what_works(cli):
    assert "device=cpu" in the_sentence(cli(*TINY, "device=cuda"))


def test_a_sub_vector_longer_than_a_row_names_the_layer(cli, place):
    sentence = the_sentence(cli(*TINY, "method.vector_dim=40"))
    assert "model.layers.0.self_attn.k_proj" in sentence and "40" in sentence and "32" in sentence
    assert not list(place.glob("outputs/cluster-*/checkpoint"))


def test_more_centroids_than_sub_vectors_names_the_layer(cli):
    sentence = the_sentence(cli(*TINY, "method.codebook_size=60000"))
    assert "model.layers.0" in sentence and "60000" in sentence and "1024" in sentence


def test_bits_out_of_reach_say_what_is_within(cli):
    """A 10 x 10 matrix: codes take 50 bits, packed 56, and two centroids 64, so the least is 120 for D = 2."""
    heads = "num_attention_heads:1,num_key_value_heads:1"
    small = f"model.config={{hidden_size:10,intermediate_size:10,num_hidden_layers:1,{heads}}}"
    sentence = the_sentence(cli(*TINY[:1], *TINY[2:4], "evaluate.context=32", small, "bits=1"))
    assert "model.layers.0.self_attn.q_proj" in sentence and "1.200" in sentence


def test_a_context_longer_than_the_model_takes_is_refused(cli):
    sentence = the_sentence(cli(*TINY, "evaluate.context=513"))
    assert "evaluate.context" in sentence and "513" in sentence and "512" in sentence


def altered(folder: Path, change: Callable[[dict], object]) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"model.id={folder}"


@pytest.fixture
def model_folder(tmp_path) -> Path:
    from cluscomp.models.sources import TinyModel

    config = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return TinyModel(architecture="llama", config=config, seed=0).folder(tmp_path / "models")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(cli, model_folder, place, value):
    name = "model.layers.1.mlp.up_proj"

    def spoil(tensors):
        tensors[f"{name}.weight"][3, 5] = value

    sentence = the_sentence(cli("model=hub", altered(model_folder, spoil), *TINY[2:], "evaluate.after=[cluster]"))
    assert name in sentence and "NaN" in sentence
    assert not list(place.glob("outputs/cluster-*/checkpoint"))


def test_a_missing_tensor_is_named(cli, model_folder):
    name = "model.layers.1.mlp.up_proj.weight"
    model = altered(model_folder, lambda tensors: tensors.pop(name))
    assert name in the_sentence(cli("model=hub", model, *TINY[2:]))


def test_a_truncated_model_file_is_named(cli, model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in the_sentence(cli("model=hub", f"model.id={model_folder}", *TINY[2:]))


def test_a_missing_model_folder_is_named(cli):
    assert "model.id=./nowhere" in the_sentence(cli("model=hub", "model.id=./nowhere", *TINY[2:]))


def test_a_text_too_short_for_one_window_says_so(cli, place):
    (place / "text.txt").write_text("Short.\n\nShorter.")
    sentence = the_sentence(cli(*TINY, "method=cluscomp_data_free"))
    assert "8 tokens" in sentence and "window of 32" in sentence  # "Shorter." is the test text


def test_the_word_run_may_be_left_out_and_a_second_run_does_nothing_again(cli, place):
    first = cli("run", *TINY)
    assert first.code == 0 and "| cluster" in first.out and "record.json" in first.out and "block 1/1" in first.err
    second = cli(*TINY)
    assert second.code == 0 and "block 1/1" not in second.err and "finished before" in second.err
    assert second.out == first.out
    assert {path.name for path in place.iterdir()} == {"text.txt", "outputs"}  # no litter of Hydra's


def test_a_run_may_measure_nothing(cli):
    done = cli(*TINY, "evaluate.after=[]")
    assert done.code == 0 and done.out.startswith("checkpoint  ") and "record.json" in done.out


def test_a_sweep_leaves_a_record_each_and_measures_the_original_once(cli, place):
    done = cli(*TINY, "-m", "method.codebook_size=8,16")  # -m anywhere
    assert done.code == 0
    assert "cell 1 of 2  method.codebook_size=8\n" in done.err
    assert re.search(r"cell 2 of 2  method\.codebook_size=16  \d+:\d\d left\n", done.err)
    rows = [line for line in done.out.splitlines() if "| finished" in line]
    records = [json.loads(path.read_text()) for path in place.glob("outputs/run-*/record.json")]
    for size in (8, 16):
        (score,) = [
            score["value"] for record in records for score in record["scores"]
            if score["after"] == "cluster" and score["metric"] == "perplexity"
            and record["config"]["stages"]["cluster"]["method"]["codebook_size"] == size
        ]  # fmt: skip
        assert any(f"codebook_size={size} " in row and f"{score:.2f}" in row for row in rows), done.out
    assert len(list(place.glob("outputs/run-*/record.json"))) == 2
    assert len(list(place.glob("outputs/evaluate-*"))) == 3
    assert {path.name for path in place.iterdir()} == {"text.txt", "outputs"}


def test_a_sweep_over_seeds_measures_the_original_once(cli, place):
    assert cli("-m", *TINY, "seed=0,1").code == 0
    assert len(list(place.glob("outputs/evaluate-*"))) == 3


def test_a_sweep_with_a_wrong_value_ends_in_the_sentence(cli):
    sentence = the_sentence(cli("-m", *TINY, "seed=0,x"))
    assert "seed" in sentence and "'x'" in sentence


def test_a_cell_that_fails_does_not_stop_the_others_and_all_are_listed(cli, place):
    """K = 5000 exceeds the sub-vectors of a matrix, which shows when the model is opened."""
    more = [item for item in TINY if "codebook_size" not in item]
    done = cli("-m", *more, "name=sizes", "method.codebook_size=5000,16", "evaluate.after=[]")
    assert done.code == 1 and "5000 exceeds" in done.err and "1 of 2 cells are not finished" in done.err
    assert len(list(place.glob("outputs/run-*/record.json"))) == 1
    listed = cli("status", "sizes")
    assert listed.code == 1
    rows = [line.split("|") for line in listed.out.splitlines() if "codebook_size" in line]
    assert [[part.strip() for part in row[1:3]] for row in rows] == [
        ["method.codebook_size=16", "finished"], ["method.codebook_size=5000", "failed"]
    ]  # fmt: skip
    again = cli("-m", *more, "name=sizes", "method.codebook_size=5000,16,32", "evaluate.after=[]", "retry=true")
    assert again.code == 1 and "5000 exceeds" in again.err and "2 of 3 cells are not finished" in again.err
    assert "finished before" not in again.err and len(list(place.glob("outputs/run-*/record.json"))) == 1
    assert "not finished" in the_sentence(cli("collect", "sizes"))
    assert "NAME" in the_sentence(cli("status")) and "there are: sizes" in the_sentence(cli("status", "siezs"))


def test_ctrl_c_ends_in_a_sentence_and_leaves_no_checkpoint(place, cache, forks):
    """Interrupted within block_finetune's first block, the clustering stays whole and the rest is absent."""
    pid = forks.start(
        place / "told", *TINY, "order=[cluster,block_finetune]", "block_finetune=quick", "block_finetune.length=32",
        "block_finetune.epochs=100000", "evaluate.after=[block_finetune]", errors=place / "errors", folder=place,
        variables={"CLUSCOMP_CACHE": str(cache)},
    )  # fmt: skip
    until(lambda: all(map(list, map(place.glob, ("outputs/cluster-*/metrics.json", "outputs/block_finetune-*/lock")))))
    time.sleep(1)
    os.kill(pid, signal.SIGINT)
    until(lambda: "cluscomp: interrupted" in (place / "errors").read_text(), seconds=60)
    done = SimpleNamespace(code=forks.wait(pid), err=(place / "errors").read_text())
    assert the_sentence(done, 130).startswith("cluscomp: interrupted") and (place / "told").read_text() == ""
    assert list(place.glob("outputs/cluster-*/checkpoint"))
    assert not list(place.glob("outputs/block_finetune-*/checkpoint"))
    assert not list(place.rglob(".*"))  # nor a half-written file under any other name


# the plan


def test_a_plan_says_what_the_run_then_does(cli, place):
    assert cli("plan", *TINY).out.count("about") == 2  # of 32-bit numbers those that 16 bits hold are stored as such
    told = cli("plan", *TINY, "dtype=bfloat16")
    assert told.code == 0 and not (place / "outputs").exists()
    assert cli(*TINY, "dtype=bfloat16").code == 0
    record = json.loads(next((place / "outputs").glob("run-*/record.json")).read_text())
    predicted, size = record["machine"]["predicted"], record["size"]
    assert predicted["exact"] and predicted["checkpoint_bytes"] == size["checkpoint_bytes"]
    for key in ("linear_bits_per_weight", "paper_bits_per_weight", "model_bits_per_weight"):
        assert predicted["size"][key] == pytest.approx(size[key])
        assert f"{size[key]:.3f}" in told.out
    assert predicted["peak_ram"].keys() == record["machine"]["peak_ram"].keys() == record["run"]["seconds"].keys()
    assert all(f"\n{stage}  " in told.out for stage in predicted["seconds"])


def test_what_cannot_fit_is_refused_before_anything_is_opened_unless_forced(cli, place):
    large = [*TINY, "evaluate.batch_size=100000000"]  # of which the text then fills two windows
    assert re.search(r"evaluate original would need \d+\.\d GiB of RAM.*force=true", the_sentence(cli(*large)))
    assert [path.name for path in (place / "outputs").iterdir()] == ["cells"]
    assert cli(*large, "force=true").code == 0


def test_a_plan_for_another_machine_is_for_plans_alone(cli, place):
    told = cli("plan", *TINY, "machine=a6000")
    assert told.code == 0 and "  GPU  " in told.out and "a6000" in told.out
    assert "only `cluscomp plan`" in the_sentence(cli(*TINY, "machine=a6000"))


def test_a_type_that_this_processor_is_slow_in_is_told(cli, tmp_path, monkeypatch):
    """By borders that every processor is above and below: two measurements about one border need not agree."""
    arguments, told = ["plan", *TINY, f"cache={tmp_path}"], "dtype=float32 is faster here"
    monkeypatch.setattr(preparation, "SLOW", 0.0)
    assert told in cli(*arguments, "dtype=bfloat16").err
    assert told not in cli(*arguments, "dtype=float32").err
    monkeypatch.setattr(preparation, "SLOW", 1e9)
    assert told not in cli(*arguments, "dtype=bfloat16").err
    experiment = composed([*TINY, "device=cpu", "dtype=auto"])
    assert preparation.dtype_of(experiment) == torch.float32
    monkeypatch.setattr(preparation, "SLOW", 1e-9)
    assert preparation.dtype_of(experiment) == torch.bfloat16


def test_calibration_measures_this_machine(cli, tmp_path):
    assert "assumed" in cli("plan", *TINY, f"cache={tmp_path}").out
    assert "speed measured" in cli("plan", "--calibrate", *TINY, f"cache={tmp_path}").out
    assert "speed measured" in cli("plan", *TINY, f"cache={tmp_path}").out
