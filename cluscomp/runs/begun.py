"""What lies in a stage's folder before it is finished: parts, of which checkpoint they are, and what code made them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from cluscomp.runs.capsule import commit
from cluscomp.store.files import new_file

log = logging.getLogger("cluscomp")
OF = "of"  # the file in a stage's folder that tells what it works on, and by what code


def begin(name: str, folder: Path, of: str | None, *, fresh: bool) -> None:
    """Let stage `name` begin in its folder, or go on with what a killed process left there, and mark it.

    `of` is the hash of the checkpoint that it works on (None: the original, which the folder's name tells). Parts of
    another one are removed; if `fresh`, so are those that were not made by the same, clean code. Otherwise parts made
    by other code are reused; the log says so, and uncommitted parts keep the result marked dirty.
    """
    before, now = begun(folder), {"of": of} | code()
    if before.get("of", of) != of or (fresh and (before != now or now["dirty"])):
        keep_alone(folder, "checkpoint", "metrics.json", "lock")
    elif "commit" in before:
        if told(before) != told(now):
            log.info("%s  begun by %s; this is %s", name, told(before), told(now))
        now["dirty"] = now["dirty"] or before["dirty"]
    with new_file(folder / OF) as unfinished:
        unfinished.write_text(json.dumps(now), encoding="utf-8")


def begun(folder: Path) -> dict[str, Any]:
    """Of which checkpoint (`of`) and by which code (`commit`, `dirty`) the parts in a folder are; {} if none tells."""
    if not (folder / OF).is_file():
        return {}
    text = (folder / OF).read_text(encoding="utf-8")
    return dict(json.loads(text)) if text.startswith("{") else {"of": text}  # of before it told of the code


def tell_of_other_code(what: str, found: dict[str, Any]) -> None:
    """A line in the log if metrics or a record were finished by other code than this."""
    then, now = (told(one) for one in (found, code()))
    if then != now:
        log.info("%s  finished before, by %s; this is %s", what, then, now)


def told(found: dict[str, Any]) -> str:
    """By which code something was made, in words."""
    made = f"commit {found['commit'][:12]}" if found.get("commit") else "code of no commit"
    return f"{made} with changes" if found.get("dirty") else made


def code() -> dict[str, Any]:
    """Of which commit the code is that computes, and whether it differs from it."""
    return dict(zip(("commit", "dirty"), commit()))


def keep_alone(folder: Path, *names: str) -> None:
    """Remove all else from a folder: what let a killed stage go on, and what killed processes left half-written."""
    for path in folder.iterdir():
        if path.name not in names:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
