"""README and docs/: what they tell a reader to type is what the program takes, and it is short enough to be read."""

import re
import shlex
from pathlib import Path

from cluscomp.command.compose import composed

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HELP = ROOT / "conf" / "hydra" / "help" / "cluscomp.yaml"
OTHER_COMMANDS = {"status", "collect", "table", "plot", "verify", "export", "list", "lm_eval"}


def commands():
    """(document, words) of each line that begins with `cluscomp` in a block of code."""
    for document in DOCUMENTS:
        for line in document.read_text().replace("\\\n", "").splitlines():
            if re.match(r"\s{4,}(?:torchrun --nproc_per_node \d+ -m )?cluscomp (?!--help)", line):
                words = shlex.split(line, comments=True)
                yield document.name, words[words.index("cluscomp") + 1 :]


def test_a_run_on_several_processes_in_the_documents_can_start():
    """This machine runs it, and its processes share every batch evenly."""
    found = 0
    for document in DOCUMENTS:
        for line in re.findall(r"^\s{4,}torchrun .*", document.read_text().replace("\\\n", ""), re.M):
            words = shlex.split(line, comments=True)
            made, processes = composed(words[words.index("cluscomp") + 1 :]), int(words[2])
            assert made.machine.here, line
            for stage in (made.stages[name] for name in made.order if hasattr(made.stages[name], "check_processes")):
                stage.check_processes(processes)
            found += 1
    assert found >= 3


def test_every_command_in_the_documents_composes(tmp_path):
    """Of a sweep its first cell. Launchers and sweepers are Hydra's own, and need packages of theirs."""
    known = set()
    for document, words in commands():
        if words[0] in OTHER_COMMANDS or "..." in words or any(word.startswith("trust=") for word in words):
            continue
        sweep = "-m" in words
        items = [word for word in words if "=" in word and not word.startswith("hydra")]
        if sweep:
            items = [item if "[" in item or "(" in item else item.split(",")[0] for item in items]
        items = [item for item in items if "(" not in item]
        items = [item.replace("data_root=FOLDER", f"data_root={tmp_path}") for item in items]
        if (given := frozenset(items)) not in known:
            assert composed(items).name, (document, words)
            known.add(given)
    assert len(known) > 20


def test_every_option_of_a_command_on_records_is_told_by_it():
    """`cluscomp table NAME [format=md] ...`: a document names no option that the command does not take."""
    text = "".join(path.read_text() for path in [*(ROOT / "cluscomp" / "command").glob("*.py"), HELP])
    for document, words in commands():
        if words[0] in OTHER_COMMANDS:
            assert all(word.partition("=")[0] in text for word in words if "=" in word), (document, words)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) < 400


def test_the_readme_has_the_systems_of_the_methods_page():
    readme, methods = ((ROOT / name).read_text().splitlines() for name in ("README.md", "docs/methods.md"))
    first = methods.index("| system | what it is | command |")
    systems = methods[first : methods.index("", first)]
    assert len(systems) == 12 and "\n".join(systems) in "\n".join(readme)


def test_links_between_documents_lead_somewhere():
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_settings_that_documents_name_are_there():
    """`method.floor`, `recover.loss`: a key that was renamed would stay in the documents."""
    known = {path.parent.name for path in (ROOT / "conf").glob("*/*.yaml")}
    keys = {}
    for group in known:
        files = (ROOT / "conf" / group).glob("*.yaml")
        keys[group] = {key for file in files for key in re.findall(r"^([a-z_]+):", file.read_text(), flags=re.M)}
    named = 0
    for document in DOCUMENTS:
        for group, key in re.findall(r"`(?:'|\+)?([a-z_]+)\.([a-z_]+)(?:=[^`]*)?`", document.read_text()):
            if (
                group in known
                and key not in ("yaml", "safetensors")
                and not (ROOT / "cluscomp" / group / f"{key}.py").exists()
            ):
                assert key in keys[group], (document.name, f"{group}.{key}")
                named += 1
    assert named > 15
