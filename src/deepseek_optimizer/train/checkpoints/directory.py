"""The directory that a run's checkpoints lie in: which there are, which is the newest whole one, and what goes."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import CheckpointError
from .manifest import verify

logger = logging.getLogger(__name__)

LOCK = ".train.lock"
# Seconds that a lock is waited for: data loader workers of a run that was killed hold it until they see that it is gone, which
# they look for every 5 s.
LOCK_WAIT = 8.0
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\.checkpoint-\d+\..*tmp(\.old)?")


def step_of(directory: Path) -> int | None:
    """The step of a checkpoint's name; None if it is not one."""
    match = _NAME.fullmatch(directory.name)
    return int(match[1]) if match else None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run by their names, whole or not, the oldest first."""
    found = [(step, path) for path in run.iterdir() if (step := step_of(path)) is not None] if run.is_dir() else []
    return [path for _, path in sorted(found)]


def newest_whole(run: Path) -> Path:
    """The newest checkpoint that is whole; damaged ones before it are passed over, with a warning that names the file.

    Raises:
        CheckpointError: there is none.
    """
    damaged = []
    for path in reversed(checkpoints(run)):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(f"{error}")
            logger.warning("A damaged checkpoint is passed over: %s", error)
            continue
        if damaged:
            logger.warning("Training goes on from the one before: %s", path)
        return path
    what = f"none of its checkpoints is whole ({'; '.join(damaged)})" if damaged else "there is no checkpoint in it"
    raise CheckpointError(f"{what}; begin without resume_from_checkpoint", file=run)


def verified(directory: Path) -> Path:
    """The checkpoint that was named, if it is whole.

    Raises:
        CheckpointError: it is not; the message offers the newest whole one before it.
    """
    try:
        verify(directory)
    except CheckpointError as error:
        step = step_of(directory)
        for path in reversed(checkpoints(directory.parent)):
            if step is not None and (step_of(path) or 0) < step and _is_whole(path):
                offer = CheckpointError(f"{error}. The one before it is whole: resume_from_checkpoint={str(path)!r}")
                offer.file = error.file
                raise offer from error
        raise
    return directory


def rotate(run: Path, keep: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints until `keep` are left (None or 0: all stay); the newest and the best one always stay.

    Each loses its name before its files go, so that no half of it is ever seen.
    """
    if not keep or keep < 0:
        return
    present = checkpoints(run)
    protected = {os.path.realpath(path) for path in present[-1:]} | ({os.path.realpath(best)} if best else set())
    removable = [path for path in present if os.path.realpath(path) not in protected]
    for path in removable[: max(0, len(present) - max(keep, len(protected)))]:
        remove(path)


def remove(directory: Path) -> None:
    """Removes a checkpoint: its name at once, its files then."""
    nameless = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    os.rename(directory, nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Removes what killed runs left: checkpoints without a name. Only for who holds the lock."""
    for path in run.iterdir() if run.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run's directory for this process: a second run that would write there is an error. The lock ends with the
    process, however it ends.

    Raises:
        CheckpointError: another run has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK, timeout=LOCK_WAIT)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another run trains into this directory now (it holds {LOCK}); wait for it or give this run another output_dir",
            file=run,
        ) from error
    try:
        yield
    finally:
        (run / LOCK).unlink(missing_ok=True)
        lock.release()


def _is_whole(directory: Path) -> bool:
    try:
        verify(directory)
    except CheckpointError:
        return False
    return True
