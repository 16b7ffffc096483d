"""What a run was made with: commit of the code and what differs from it, packages, command, hashes of what it read."""

import functools
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluscomp import __version__
from cluscomp.store.files import new_file, written_alone
from cluscomp.store.records import content_key, to_json
from cluscomp.store.secrets import hide, hide_all, hide_override

HERE = Path(__file__).parent


def versions() -> dict[str, str]:
    """Versions of what has a say in the numbers."""
    names = ("torch", "transformers", "safetensors", "datasets", "numpy")
    return {"cluscomp": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


@functools.cache
def _top() -> Path | None:
    """The checkout that this code is a part of, if it is of one."""
    if shutil.which("git") is None:
        return None
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return Path(_git("rev-parse", "--show-toplevel").strip())
    except subprocess.CalledProcessError:
        return None


@functools.cache  # what counts is the code that this process began with
def commit() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it differs from it; None where there is no git checkout of this code.

    A package that is installed somewhere in another project's checkout is no part of that one's commits.
    """
    if _top() is None:
        return None, None
    try:
        return _git("rev-parse", "HEAD").strip(), bool(_git("status", "--porcelain"))
    except subprocess.CalledProcessError:
        return None, None


def leave_out(folder: Path) -> None:
    """Let git pass over a folder of outputs inside this code's checkout: a run would make the tree look changed."""
    top = _top()
    if top is None or top not in folder.resolve().parents:
        return
    if not _git("ls-files", str(folder)) and not _git("check-ignore", str(folder), codes=(0, 1)):
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")


@functools.cache
def changes() -> str:
    """What the source tree has that its commit has not, new files included, as a patch for `git apply`."""
    top = _top()
    if top is None or not commit()[1]:
        return ""
    new = [name for name in _git("ls-files", "--others", "--exclude-standard", "-z", place=top).split("\0") if name]
    parts = [_git("diff", "HEAD", place=top)]
    parts += [_git("diff", "--no-index", "/dev/null", name, place=top, codes=(0, 1)) for name in new]
    return "".join(parts)


@functools.cache
def packages() -> list[str]:
    """All that is installed, as NAME==VERSION."""
    return sorted({f"{one.name}=={one.version}" for one in importlib.metadata.distributions()})


def seal(folder: Path, overrides: list[str], found: dict[str, Any]) -> Path:
    """Write `found` (settings, device, hashes) and what the run was made with into a run's folder, without secrets.

    The file, capsule-KEY.json, is named by its content: a run that goes on with other code leaves a second one.
    """
    made, dirty = commit()
    contents = hide_all(found) | {
        "command": [hide_override(item) for item in sys.argv],
        "overrides": [hide_override(item) for item in overrides],
        "commit": made,
        "dirty": dirty,
        "changes": hide(changes()),
        "python": platform.python_version(),
        "packages": packages(),
    }
    path = folder / f"capsule-{content_key(contents)}.json"
    with written_alone(path):
        if not path.is_file():
            with new_file(path) as unfinished:
                unfinished.write_text(to_json(contents) + "\n")
    return path


def _git(*words: str, place: Path = HERE, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode not in codes:
        raise subprocess.CalledProcessError(done.returncode, ["git", *words], done.stdout, done.stderr)
    return done.stdout
