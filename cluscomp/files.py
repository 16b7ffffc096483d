"""Files that are whole or absent: nothing half-written ever carries its final name; and one process at a time."""

import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

log = logging.getLogger(__name__)
POLL = 0.2  # seconds between two looks at a lock that another process holds


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `target` (replacing one there) only if the block ends well.

    Otherwise it disappears. Raises OSError if the place cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write that becomes `target` only if the block ends well. Raises OSError if that cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}-{uuid4().hex}")
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def held_alone(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time into `folder`, which is made if need be; others wait, with a line in the log.

    The lock is the system's: it is free as soon as its holder ends, however it ends. The file `lock` names the holder
    and disappears after use. Raises OSError if the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("%s  waits for %s, which holds %s", what, _holder(path), path)
        lock.acquire(poll_interval=POLL)
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}\n")
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether some process is in `folder` by `held_alone` right now."""
    from filelock import FileLock, Timeout

    path = folder / "lock"
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def _holder(path: Path) -> str:
    """What the lock's file says of its holder, who may just now be writing it."""
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
