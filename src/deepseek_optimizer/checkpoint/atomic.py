"""Writing a directory, or a file, so that its name never shows half of it."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_directory(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a fresh directory beside `target`; on leaving, its files are synced and it takes the target's name at once.

    Whatever interrupts it (an exception, a full disk, kill -9), the target is what it was before: absent, or the old one whole.
    An exception also removes the temporary directory (`.<name>.<random>.tmp`); after a kill it stays, and may be deleted.

    Args:
        target: the directory to make. Its parent is made if need be.
        overwrite: replace a target that exists; otherwise that is a CheckpointError.
    """
    target = Path(os.path.abspath(target))
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, target, overwrite)
    except OSError as error:
        if error.filename is None:  # a write does not know its file, and a full disk should be found
            error.filename = str(target)
        raise
    finally:
        if temporary.is_symlink() or temporary.is_file():
            temporary.unlink()
        else:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a fresh file beside `target` to write into; on leaving, it is synced and takes the target's name at once, in place
    of what was there. Whatever interrupts it, the target is what it was before.

    Args:
        target: its directory is made if need be.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync(target.parent)
    except OSError as error:
        if error.filename is None:  # a write does not know its file, and a full disk should be found
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Syncs `temporary`, a directory on the same file system, and gives it the target's name at once; a target that was there
    has the temporary name afterwards."""
    sync_tree(temporary)
    check_free(target, overwrite)
    if os.path.lexists(target):
        _exchange(temporary, target)
    else:
        try:
            os.rename(temporary, target)
        except OSError as error:
            raise CheckpointError(f"cannot take its final name: {error}", file=target) from error
    sync(target.parent)


def leftovers(target: str | os.PathLike[str]) -> list[Path]:
    """Temporary directories of `atomic_directory` beside `target`: of runs that were killed, or are at it now."""
    target = Path(os.path.abspath(target))
    mine = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.tmp(\.old)?")
    return sorted(p for p in target.parent.iterdir() if mine.fullmatch(p.name)) if target.parent.is_dir() else []


def check_free(target: Path, overwrite: bool) -> None:
    """CheckpointError if the target exists and may not be replaced."""
    if not overwrite and os.path.lexists(target):
        raise CheckpointError("exists already; name another directory or ask to overwrite it", file=target)


def sync_tree(directory: Path) -> None:
    """Flushes all files below a directory, and all names, to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Flushes a file, or a directory's names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a directory to flush
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """The two names change places, in one system call where there is one."""
    if sys.platform.startswith("linux"):
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 and renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)
