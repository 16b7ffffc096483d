"""Files that are whole or absent: nothing half-written ever carries its final name; and one process at a time."""

import hashlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from cluscomp.errors import InputError
from cluscomp.process import rank

if TYPE_CHECKING:
    from filelock import LeaseCompromise, SoftFileLease

log = logging.getLogger(__name__)
POLL = 0.2  # seconds between two looks at a lock that another process holds
LEASE = 120.0  # seconds without a touch after which the holder of a lock, on another machine, counts as dead


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `target` (replacing one there) only if the block ends well.

    Otherwise it disappears. Where `target` is a link, the folder that it leads to is replaced. Folder and files are as
    readable as the user's umask says, whatever library wrote them.
    Raises OSError if the place cannot be written.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}-{uuid4().hex}")
    unfinished.mkdir()
    usual = unfinished.stat().st_mode & 0o666
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(usual)
        before = target.with_name(f"{unfinished.name}-before")
        if target.exists():  # out of the way first: a kill leaves one of both under some name
            target.rename(before)
        unfinished.rename(target)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write that becomes `target` only if the block ends well, as readable as the user's umask says.

    Raises OSError if that cannot be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}-{uuid4().hex}")
    try:
        unfinished.touch()
        usual = unfinished.stat().st_mode & 0o666
        yield unfinished
        unfinished.chmod(usual)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def writable(key: str, value: str) -> Path:
    """A folder that a setting names, made if need be. Raises InputError if it cannot be written."""
    folder = Path(value).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{key}={value}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{key}={value}: cannot be written")
    return folder


@contextmanager
def held_alone(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time into `folder`, which is made if need be; others wait, with a line in the log.

    The file `lock` names the holder, who touches it all the while, so that it holds on a file system that several
    machines share. That a holder on this machine has ended, however it ended, is seen at once; one on another machine
    counts as dead when its lock was not touched for LEASE seconds. A holder that was stopped for so long itself (a
    suspended job) and finds another in its place is interrupted. Raises OSError if the folder cannot be written.
    """
    from filelock import Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = _lease(folder)
    with _ctrl_c_as_itself():
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("%s  waits for %s, which holds %s", what, _holder(lock), lock.lock_file)
            lock.acquire(poll_interval=POLL)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written_alone(target: Path) -> Iterator[None]:
    """`held_alone` in the folder of a file, to write it; what killed processes left half-written of it goes first.

    All who write this file have to do it so: what is unfinished then belongs to nobody.
    """
    with held_alone(target.parent, target.name):
        for unfinished in target.parent.glob(f".{target.name}-*"):
            unfinished.unlink()
        yield


def held_by_first(folder: Path, what: str) -> AbstractContextManager[None]:
    """`held_alone`, by the first process of a run for all of them: the others do what it says, when it says so."""
    return held_alone(folder, what) if rank() == 0 else nullcontext()


def is_held(folder: Path) -> bool:
    """Whether some process is in `folder` by `held_alone` right now."""
    from filelock import Timeout

    try:
        touched = (folder / "lock").stat().st_mtime
    except FileNotFoundError:
        return False
    lock = _lease(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return time.time() - touched < LEASE  # else its holder died on another machine
    lock.release()
    return False


@contextmanager
def _ctrl_c_as_itself() -> Iterator[None]:
    """Ctrl-C while a lock is asked for can come out of filelock in a group, with an error of what then cleans up."""
    try:
        yield
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        raise KeyboardInterrupt from group


def _lease(folder: Path) -> "SoftFileLease":
    from filelock import SoftFileLease

    return SoftFileLease(folder / "lock", lease_duration=LEASE, on_compromise=_interrupt)


def _interrupt(lost: "LeaseCompromise") -> None:
    log.warning("another process has taken %s, for this one did not touch it in time: interrupted", lost.lock_file)
    os.kill(os.getpid(), signal.SIGINT)  # this is not the main thread, which alone can be interrupted


def _holder(lock: "SoftFileLease") -> str:
    """What the lock's file says of its holder, who may just now be writing it."""
    owner = lock.owner
    return "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
