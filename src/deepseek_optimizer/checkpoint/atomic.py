"""Atomic writes of files and directories."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from .locks import HAS_LOCKS, hold

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def atomic_directory(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a new directory beside `target`; on exit, its files are synced and it is renamed to `target` in one step.

    If anything interrupts it (an exception, a full disk, kill -9), the target stays as it was: absent, or the old directory.
    An exception also removes the temporary directory (`.<name>.<random>.tmp`); after a kill it remains until the next write of
    the same target. A file system that cannot exchange two names in one call needs two renames; a kill between them leaves the
    old directory under the temporary name with `.old`, and the next write of the target restores it first.

    Args:
        target: the directory to create. Its parent is created if necessary.
        overwrite: replace an existing target; otherwise that is a CheckpointError.
    """
    target = Path(os.path.abspath(target))
    check_free(target, overwrite)
    with _temporary(target, Path.mkdir) as folder:
        yield folder
        publish(folder, target, overwrite)


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a new file beside `target`; on exit, it is synced and replaces `target` in one step. If anything interrupts it,
    the target stays as it was.

    Args:
        target: the file to write. Its directory is created if necessary.
    """
    target = Path(os.path.abspath(target))
    with _temporary(target, lambda path: path.touch(exist_ok=False)) as path:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, target)
        sync(target.parent)


@contextmanager
def merged_directory(target: str | os.PathLike[str], replaces: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yields a new directory; on exit, its files replace those of the same names in `target`, whose other files stay.

    The target changes in one step: its other files are linked into the new directory, which is then renamed. If the directory
    cannot be replaced (a mount point, this process's working directory, a parent without write permission, other file systems
    below it), files are replaced one by one, `config.json` last; a kill in between leaves a mixture.

    Args:
        target: a directory, created if necessary.
        replaces: whether a file at the top of the target, given by name, is made obsolete and removed.
    """
    target = Path(os.path.realpath(target))
    if not target.is_dir():
        with atomic_directory(target) as folder:
            yield folder
    elif _is_replaceable(target):
        with _temporary(target, Path.mkdir) as folder:
            yield folder
            shutil.copystat(target, folder)
            written = {path.name for path in folder.iterdir()}
            _link_others(target, folder, replaces)
            publish(folder, target, overwrite=True)
            _link_others(folder, target, lambda name: name in written or replaces(name))  # added meanwhile
    else:
        with _temporary(target / "merged", Path.mkdir) as folder:
            yield folder
            written = {path.name for path in folder.iterdir()}
            _move_files(folder, target)
            for path in target.iterdir():
                if replaces(path.name) and path.name not in written:
                    path.unlink()
            sync(target)


def publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Syncs `temporary`, a directory on the same file system, and renames it to `target` in one step; an existing target has
    the temporary name afterwards."""
    sync_tree(temporary)
    check_free(target, overwrite)
    if os.path.lexists(target):
        _exchange(temporary, target)
    else:
        try:
            os.rename(temporary, target)
        except OSError as error:
            raise CheckpointError(f"cannot be renamed to its final name: {error}", file=target) from error
    sync(target.parent)


def sweep(target: str | os.PathLike[str]) -> list[Path]:
    """Removes temporary files and directories beside `target` that killed processes left.

    Returns: those that remain, because a process is writing them or the file system has no locks.
    """
    target = Path(os.path.abspath(target))
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.tmp(\.old)?")
    leftovers = sorted(p for p in target.parent.iterdir() if pattern.fullmatch(p.name)) if target.parent.is_dir() else []
    return [path for path in leftovers if not _swept(path, target)]


def check_free(target: Path, overwrite: bool) -> None:
    """CheckpointError if the target exists and may not be replaced."""
    if not overwrite and os.path.lexists(target):
        raise CheckpointError("exists already; choose another directory, or allow overwriting", file=target)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file name to system errors that have none, such as those of a write. Errors of `tokenizers` and `safetensors`,
    which have their own types, become OSErrors."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if type(error).__name__ not in ("Exception", "SafetensorError") or not (number := _RUST_ERROR.search(str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def sync_tree(directory: Path) -> None:
    """Flushes all files and directory entries below a directory to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Flushes a file, or a directory's entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # directories cannot be opened on Windows
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swaps the two names, in one system call where possible."""
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
    with suppress(FileNotFoundError):  # another writer removed it; it is not needed
        os.rename(aside, new)


@contextmanager
def _temporary(target: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new temporary path beside `target`, removed afterwards, which no other writer sweeps while this process lives."""
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        path, handle = _made(target, make)
        try:
            yield path
        finally:
            _remove(path)
            if handle is not None:
                os.close(handle)


def _made(target: Path, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    """A new temporary path, and the handle that holds its lock."""
    while True:
        path = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
        make(path)
        if not HAS_LOCKS:
            return path, None
        try:
            return path, hold(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer removed it before it was locked
        except OSError:
            return path, None  # a file system without locks: nothing is swept


def _swept(path: Path, target: Path) -> bool:
    """Removes a temporary path if the process that made it is gone; returns whether it was removed."""
    old = path.suffix == ".old"
    if not HAS_LOCKS:
        return False
    handles = []
    try:
        if old:  # it belongs to the writer of the directory without that suffix
            with suppress(FileNotFoundError):
                handles.append(hold(path.with_suffix("")))
        handles.append(hold(path))
        if old and not os.path.lexists(target):
            os.rename(path, target)  # killed between two renames
        else:
            _remove(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        for handle in handles:
            os.close(handle)
    return not os.path.lexists(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # the next write removes it
            path.unlink()


def _is_replaceable(directory: Path) -> bool:
    """Whether another directory, with links to its files, can replace this one."""
    if os.path.ismount(directory) or directory == Path.cwd() or not os.access(directory.parent, os.W_OK | os.X_OK):
        return False
    device = directory.stat().st_dev
    places = [directory.parent, *(Path(root, name) for root, folders, _ in os.walk(directory) for name in folders)]
    return all(place.lstat().st_dev == device for place in places) and not any(map(os.path.ismount, places[1:]))


def _link_others(source: Path, target: Path, leave: Callable[[str], bool]) -> None:
    """Links files of `source` that are missing in `target` into it, except for top-level names for which `leave` is true."""
    for root, folders, names in os.walk(source):
        top = root == str(source)
        place = target / Path(root).relative_to(source)
        for name in names:
            if not (top and leave(name)) and not os.path.lexists(place / name):
                os.link(Path(root, name), place / name, follow_symlinks=False)
        for name in folders:
            if Path(root, name).is_symlink():
                if not os.path.lexists(place / name):
                    os.link(Path(root, name), place / name, follow_symlinks=False)
            elif not (place / name).is_dir():
                (place / name).mkdir()
                shutil.copystat(Path(root, name), place / name)


def _move_files(source: Path, target: Path) -> None:
    """Syncs the files below `source` and moves each to the same place below `target`."""
    sync_tree(source)
    for root, _, names in os.walk(source):
        place = target / Path(root).relative_to(source)
        place.mkdir(exist_ok=True)
        for name in sorted(names, key=lambda name: (name == "config.json", name)):
            os.replace(Path(root, name), place / name)
        sync(place)
