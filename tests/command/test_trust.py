"""What files may not do: name what settings build, or what Hydra runs; the command line alone can trust a module."""

import sys
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf
from pipelines import composed

from cluscomp.__main__ import main
from cluscomp.command import compose, trust
from cluscomp.errors import InputError

MODULE = """
from pathlib import Path
from cluscomp.settings import settings
Path(__file__).with_name("ran").touch()

def function(**_): ...

class Plain: ...

@settings
class Tracker:
    def begin(self, *_): ...
"""
TARGETS = [  # what Hydra's own list lets through, and ways to it over names of ours
    "pathlib.Path.unlink", "pathlib.Path.write_text", "pandas.read_pickle", "builtins.eval", "mine.Tracker",
    "cluscompared.Class", "cluscomp", "cluscomp.runs.capsule.subprocess.run", "cluscomp.store.files.Path",
    "cluscomp.store.files.shutil.rmtree", "cluscomp.command.records.verify", "cluscomp.store.records.Record.nothing",
    "hydra.utils.get_object", "", 7, None, ["pathlib.Path"],
]  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path / "ran"


def test_settings_build_classes_of_settings_of_the_project_alone(mine):
    for target in TARGETS:
        with pytest.raises(InputError, match=r"^tracker\.deep\.0\._target_ = "):
            trust.check({"trust": None, "tracker": {"deep": [{"_target_": target}]}}, trust.given([]))
            trust.settings_class(target, "tracker.deep.0", trust.OWN)  # those whose name begins as ours do
    with pytest.raises(InputError, match="trust=mine"):
        composed("bits=3", "tracker._target_=mine.Tracker")
    assert not mine.exists()  # it was refused by its name


def test_the_command_line_trusts_a_module_and_of_it_classes_of_settings(mine):
    for target in ("mine.function", "mine.Plain", "mine.Path", "mine.absent", "mine.Path.unlink"):
        with pytest.raises(InputError, match=rf"tracker\._target_ = {target}: "):
            trust.settings_class(target, "tracker", trust.given(["trust=mine"]).modules)
    assert mine.exists()
    found = composed("bits=3", "trust=[other,mine]", "tracker._target_=mine.Tracker")
    assert type(found.tracker).__module__ == "mine" and "trust" not in str(found)
    for said in ("trust=1", "trust=a-b", "trust={a:1}"):
        with pytest.raises(InputError, match="give the name of a module"):
            trust.given([said])


def test_no_file_and_no_record_can_trust(mine):
    """A cell's overrides, from which verify goes on, are another's word."""
    overrides = ["bits=3", "trust=mine", "tracker._target_=mine.Tracker"]
    for said in (trust.given([]), trust.given(["trust=other"])):
        with pytest.raises(InputError, match=r"^trust = mine: .*command line alone"):
            compose.composed(overrides, said)
    with pytest.raises(InputError, match="no place here"):
        compose.composed(["bits=3", "hydra.searchpath=[pkg://mine]"], trust.given([]))
    with pytest.raises(InputError, match=r"include_path = .*command line"):
        compose.composed(["bits=3", "tasks.include_path=folder"], trust.given(["bits=3"]))
    assert not mine.exists()


NODES = {  # of Hydra's own; and what the sentence names
    "hydra.callbacks.x._target_": {"callbacks": {"x": {"_target_": "pathlib.Path.write_text", "self": "file"}}},
    "hydra.launcher._target_": {"launcher": {"_target_": "pathlib.Path.unlink"}},
    "hydra.sweeper.deep._target_": {"sweeper": {"deep": {"_target_": "pandas.read_pickle"}}},
    "hydra.callbacks.y._target_": {"callbacks": {"y": {"_target_": "hydra.experimental.callbacks.Path.unlink"}}},
    "hydra.job_logging.formatters.a.()": {"job_logging": {"formatters": {"a": {"()": "mine.function"}}}},
    "hydra.hydra_logging.handlers.a.class": {"hydra_logging": {"handlers": {"a": {"class": "logging.FileHandler"}}}},
    "hydra.job_logging.handlers.a.stream": {"job_logging": {"handlers": {"a": {"stream": "ext://mine.function"}}}},
    "hydra.job_logging.handlers.a.other": {"job_logging": {"handlers": {"a": {"other": "${oc.decode:'ext'}://os"}}}},
    "hydra.job.env_set": {"job": {"env_set": {"GIT_EXTERNAL_DIFF": "mine"}}},
    "hydra.launcher.setup": {"launcher": {"setup": ["mine"]}},
}


def test_what_hydra_itself_builds_is_of_hydra_or_of_the_project():
    for place, node in NODES.items():
        with pytest.raises(InputError) as told:
            trust.check_hydra(OmegaConf.create({"hydra": node}), trust.given([]))
        assert str(told.value).startswith(place)
    usual = {
        "launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher", "setup": ["mine"]},
        "callbacks": {"log": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}},
        "job_logging": {"handlers": {"a": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}}},
        "job": {"env_set": {"NAME": "value"}},
    }
    said = trust.given(["hydra.launcher.setup=[mine]", "+hydra.job.env_set.NAME=value"])
    trust.check_hydra(OmegaConf.create({"hydra": usual}), said)


def test_files_of_another_are_refused_before_anything_of_them_runs(mine, monkeypatch, capsys):
    """The command with --config-dir: an experiment that names callbacks, a config.yaml that names a package, ..."""
    folder = mine.parent
    (folder / "experiment").mkdir()
    target = folder / "written"
    call = {
        "_target_": "pathlib.Path.write_text",
        "_args_": [{"_target_": "pathlib.Path", "_args_": [str(target)]}, "x"],
    }
    files = {
        "callbacks": {"hydra": {"callbacks": {"x": call}}},
        "sweeper": {"hydra": {"sweeper": {"more": call}}},
        "tracker": {"tracker": call},
        "trusting": {"trust": "mine", "tracker": {"_target_": "mine.Tracker"}},
    }
    for name, values in files.items():
        (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(values)}")
    (folder / "other.yaml").write_text("defaults: [config]\nhydra:\n  searchpath: ['pkg://mine']\n")

    def told(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["cluscomp", *arguments, "bits=3", "--config-dir", str(folder)])
        with pytest.raises(SystemExit) as end:
            main()
        return SimpleNamespace(code=end.value.code, err=capsys.readouterr().err)

    monkeypatch.chdir(folder)
    for arguments, named in (
        (["experiment=callbacks"], "hydra.callbacks.x"),
        (["-m", "experiment=sweeper", "seed=0,1"], "hydra.sweeper.more"),
        (["experiment=tracker"], "tracker._target_ = pathlib.Path.write_text"),
        (["experiment=trusting"], "trust = mine"),
        (["--config-name", "other"], "hydra.searchpath = pkg://mine"),
        (["--exp", "pickle"], "--experimental-rerun"),
        (["-m", "seed=0,1", "+hydra.job.env_set.NAME=value"], "hydra.job.env_set"),
    ):
        found = told(*arguments)
        assert found.code == 2 and found.err.startswith("cluscomp: ") and named in found.err, found.err
    assert not mine.exists() and not target.exists()
