"""The directory of a run's checkpoints: listing, verification, rotation and locking."""

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
# Seconds to wait for the lock: data loader workers of a killed run hold it until they notice that their parent is gone, which
# they check every 5 s.
LOCK_WAIT = 8.0
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\.checkpoint-\d+\..*tmp(\.old)?")


def step_of(directory: Path) -> int | None:
    """The step in a checkpoint's name; None if the directory is not a checkpoint."""
    match = _NAME.fullmatch(directory.name)
    return int(match[1]) if match else None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, intact or not, in order of their steps."""
    steps = [(step, path) for path in run.iterdir() if (step := step_of(path)) is not None] if run.is_dir() else []
    return [path for _, path in sorted(steps)]


def newest_intact(run: Path) -> Path:
    """The newest intact checkpoint. Damaged ones are skipped with a warning that names the file.

    Raises:
        CheckpointError: there is none.
    """
    damaged = []
    for path in reversed(checkpoints(run)):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(f"{error}")
            logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        if damaged:
            logger.warning("resuming from the previous checkpoint: %s", path)
        return path
    what = f"has no intact checkpoint ({'; '.join(damaged)})" if damaged else "has no checkpoint"
    raise CheckpointError(f"{what}; start without resume_from_checkpoint", file=run)


def verified(directory: Path) -> Path:
    """Returns `directory` if it is an intact checkpoint.

    Raises:
        CheckpointError: it is damaged or missing; the message names the newest intact one before it.
    """
    try:
        verify(directory)
    except CheckpointError as error:
        step = step_of(directory)
        for path in reversed(checkpoints(directory.parent)):
            if step is not None and (step_of(path) or 0) < step and _is_intact(path):
                hint = CheckpointError(f"{error}; the previous checkpoint is intact: use resume_from_checkpoint={str(path)!r}")
                hint.file = error.file
                raise hint from error
        raise
    return directory


def rotate(run: Path, keep: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond a maximum number. The newest and the best one are never removed.

    Args:
        keep: maximum number of checkpoints; None or 0: no limit.
        best: path of the best checkpoint.
    """
    if not keep or keep < 0:
        return
    present = checkpoints(run)
    protected = {os.path.realpath(path) for path in present[-1:]} | ({os.path.realpath(best)} if best else set())
    removable = [path for path in present if os.path.realpath(path) not in protected]
    for path in removable[: max(0, len(present) - max(keep, len(protected)))]:
        remove(path)


def remove(directory: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that no partial checkpoint is ever visible."""
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    os.rename(directory, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Removes temporary directories left by killed runs. The caller must hold the lock."""
    for path in run.iterdir() if run.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks a run's directory, so that no other run can write to it. The lock is released when the process ends, however it
    ends.

    Raises:
        CheckpointError: another run holds the lock.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK, timeout=LOCK_WAIT)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another run is training into this directory (it holds {LOCK}); wait for it, or choose another output_dir",
            file=run,
        ) from error
    try:
        yield
    finally:
        (run / LOCK).unlink(missing_ok=True)
        lock.release()


def _is_intact(directory: Path) -> bool:
    try:
        verify(directory)
    except CheckpointError:
        return False
    return True
