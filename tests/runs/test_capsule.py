"""Capsules of real runs from a checkout with changes in no commit; what may be collected; no secret anywhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluscomp.store.secrets import HIDDEN, hide, hide_all, hide_override

ROOT = Path(__file__).parents[2]
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "not-to-be-seen-anywhere"}
GIVEN = "given-by-an-override"


def git(place: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", *words]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def checkout(without_ours, tmp_path_factory):
    """A checkout of the code of its own, and the command in it."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("cluscomp", "conf"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "native"))
    (place / ".gitignore").write_text("__pycache__/\noutputs*/\nresults/\ncache/\n")
    (place / "text.txt").write_text("\n\n".join(f"Paragraph {i} says that {i * i} is a square." for i in range(60)))
    git(place, "init", "-q")
    git(place, "add", "-A")
    git(place, "commit", "-qm", "All")

    def command(*arguments: str) -> SimpleNamespace:
        # the code of the checkout, whatever is installed; without its compiled kernels, which no commit holds
        script = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, {str(place)!r})
import cluscomp.__main__
assert cluscomp.__file__.startswith({str(place)!r})
cluscomp.__main__.main()
"""
        done = without_ours.run(*arguments, script=script, folder=place, variables=SECRETS)
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    return SimpleNamespace(place=place, command=command)


RUN = [
    "model=tiny", "data=text", "data.file=text.txt", "cache=cache", "method=cluscomp_data_free", "method.vector_dim=4",
    "method.codebook_size=8", "method.iterations=2", "evaluate.context=32", "evaluate.limit=2", "device=cpu",
]  # fmt: skip


@pytest.mark.slow
def test_a_capsule_holds_what_the_run_was_made_with_and_collect_takes_clean_runs_only(checkout):
    place, run = checkout.place, checkout.command
    (place / "conf" / "config.yaml").open("a").write("\n# a change\n")
    (place / "new.py").write_text("NEW = 1\n")
    secret = f"+hydra.job.env_set.OTHER_API_KEY={GIVEN}"
    fails = "data.file=https://me:password-in-an-address@localhost/text"
    done = run(*RUN, secret)
    assert done.code == 0, done.err
    failed = run(*RUN, secret, fails)
    assert failed.code != 0

    (path,) = place.glob("outputs/run-*/capsule-*.json")
    capsule = json.loads(path.read_text())
    record = json.loads((path.parent / "record.json").read_text())
    head = git(place, "rev-parse", "HEAD")
    assert capsule["commit"] == head and capsule["dirty"] is True and record["run"]["dirty"] is True
    assert set(record["run"]["commits"].values()) == {head}
    assert "+# a change" in capsule["changes"] and "+NEW = 1" in capsule["changes"]
    git(place, "stash", "-q", "--include-untracked")
    subprocess.run(["git", "apply"], cwd=place, input=capsule["changes"], text=True, check=True)
    assert (place / "new.py").read_text() == "NEW = 1\n" and "# a change" in (place / "conf/config.yaml").read_text()
    assert capsule["settings"] == record["config"]
    assert set(RUN) - {"cache=cache"} == set(capsule["overrides"]) and set(RUN) < set(capsule["command"])
    assert any(one.startswith("torch==") for one in capsule["packages"]) and capsule["device"] == "cpu"
    assert len(capsule["read"]["model"]) >= 16 and capsule["run"] == record["run"]["key"]
    assert capsule["data"]["evaluate"] and set(capsule["data"]) == {"cluster", "evaluate"}
    assert f"+hydra.job.env_set.OTHER_API_KEY={HIDDEN}" in capsule["command"]

    git(place, "add", "-A")
    git(place, "commit", "-qm", "Changes")
    assert run(*RUN, "name=later").code == 0  # its clustering is the one of the unclean tree
    refused = run("collect", "later")
    assert refused.code == 2 and "changes that are in no commit" in refused.err
    assert run(*RUN, "name=later", "outputs=outputs2").code == 0
    assert run("collect", "later", "outputs=outputs2").code == 0 and len(list(place.glob("results/later/*.json"))) == 1

    texts = [done.out, done.err, failed.out, failed.err]
    texts += [path.read_bytes().decode(errors="replace") for path in place.glob("outputs*/**/*") if path.is_file()]
    for secret in (*SECRETS.values(), GIVEN, "password-in-an-address"):
        assert not [text for text in texts if secret in text]


def test_what_is_secret_is_told_by_names_by_the_environment_and_by_shape(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "a-long-value")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("LONGER_TOKEN", "a-long-value-and-more")
    monkeypatch.setenv("CLUSCOMP_NAME", "an-open-value")
    assert hide("with a-long-value, abc and an-open-value") == f"with {HIDDEN}, abc and an-open-value"
    assert hide("a-long-value-and-more") == HIDDEN
    assert hide("hf_" + "a" * 30 + " at https://me:word@host/x") == f"{HIDDEN} at https://{HIDDEN}@host/x"
    assert hide("https:/me:word@host/x") == f"https:/{HIDDEN}@host/x" and hide("at 10:30 me@host") == "at 10:30 me@host"
    assert hide_override("+hydra.job.env_set.WANDB_API_KEY=xyz") == f"+hydra.job.env_set.WANDB_API_KEY={HIDDEN}"
    assert [hide_override(item) for item in ("recover.tokens=65536", "bits=3")] == ["recover.tokens=65536", "bits=3"]
    values = {"token": "xyz", "recover": {"tokens": 5, "texts": ["a-long-value"]}, "none": None}
    assert hide_all(values) == {"token": HIDDEN, "recover": {"tokens": 5, "texts": [HIDDEN]}, "none": None}


def test_outputs_inside_the_checkout_change_no_tree(checkout):
    """A folder that no .gitignore names; one that holds files of the project's own is let alone."""
    place = checkout.place
    git(place, "stash", "-q", "--include-untracked")
    before = git(place, "status", "--porcelain")
    for outputs in ("mine", "mine", "conf"):
        done = checkout.command(*RUN, f"outputs={outputs}", "name=inside")
        assert done.code == 0, done.err
        records = [json.loads(path.read_text()) for path in place.glob(f"{outputs}/run-*/record.json")]
        assert [one["run"]["dirty"] for one in records] == [bool(before) or outputs == "conf"]
    assert (place / "mine" / ".gitignore").read_text() == "*\n" and not (place / "conf" / ".gitignore").exists()


def test_an_installed_package_takes_no_commit_of_the_project_it_is_installed_in(tmp_path):
    place = tmp_path / "project" / ".venv"
    shutil.copytree(ROOT / "cluscomp", place / "cluscomp", ignore=shutil.ignore_patterns("__pycache__", "native"))
    project = place.parent
    (project / ".gitignore").write_text(".venv/\n")
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "another project")
    script = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, {str(place)!r})
from cluscomp.runs import capsule
assert capsule.__file__.startswith({str(place)!r})
capsule.leave_out(capsule.Path("outputs"))
print(capsule.commit(), repr(capsule.changes()))
"""
    (project / "outputs").mkdir()
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout == "(None, None) ''\n" and not list((project / "outputs").iterdir())
