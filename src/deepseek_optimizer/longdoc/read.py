"""Files, directories and uploads to a document. What cannot be read becomes a problem of that file, and the others are read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from io import RawIOBase

from ..errors import DocumentError
from . import readers
from .document import Document, Problem, TextFile
from .tree import files_under

LIMIT_BYTES = 128 << 20  # of a file
LIMIT_TOTAL = 1 << 30  # of all


def read_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    limit_bytes: int = LIMIT_BYTES,
    limit_total: int = LIMIT_TOTAL,
    progress: Callable[[int, int], None] | None = None,
) -> Document:
    """The text of files and directories.

    Of directories, all is read that is in them, by name, but what is hidden, and what tools put there (`tree.LEFT_OUT`). Links
    in them are not followed. A file that is named twice is read once.

    Args:
        paths: one, or several.
        limit_bytes: of a file, at most; a larger one is a problem of that file.
        limit_total: of all files, at most; what comes later is a problem of each file.
        progress: called with how many files are done, and how many there are.

    Raises:
        DocumentError: a path does not exist, or nothing could be read at all.
        MissingPackageError: a format needs a library that is not installed.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    problems: list[Problem] = []
    found = _found([os.fspath(path) for path in given], problems)
    files: list[TextFile] = []
    left = limit_total
    for done, path in enumerate(found):
        if progress is not None:
            progress(done, len(found))
        try:
            most = f"{limit_bytes:,} are the most for one file"
            if left < limit_bytes:
                most = f"only {left:,} are left for all files together"
            data = _bytes_of(path, min(limit_bytes, left), most)
            left -= len(data)
            files.append(readers.read(path, data))
        except DocumentError as error:
            problems.append(Problem(error.file, error.message))
    if progress is not None:
        progress(len(found), len(found))
    if not files:
        raise _nothing(given, problems)
    return Document(tuple(files), tuple(problems))


def read_upload(name: str, data: bytes) -> TextFile:
    """The text of bytes that were sent under a name; nothing is written to the disk or read from it.

    Raises:
        DocumentError: they could not be read; it names the file and says why.
        MissingPackageError: the format needs a library that is not installed.
    """
    return readers.read(name, data)


def _found(paths: list[str], problems: list[Problem]) -> list[str]:
    for path in paths:
        if not os.path.lexists(path):
            raise DocumentError(path, "does not exist")
    found: dict[str, str] = {}  # real path -> path
    for path in paths:
        for file in files_under(path, problems) if os.path.isdir(path) else (path,):
            found.setdefault(os.path.realpath(file) if len(paths) > 1 else file, file)
    return list(found.values())


def _bytes_of(path: str, limit: int, most: str) -> bytes:
    """A file's bytes as they were at one time.

    Args:
        most: what to say of the limit.

    Raises:
        DocumentError: it cannot be read, is none, is too large, or does not hold still.
    """
    try:
        # A FIFO or a device may block or never end; O_NONBLOCK, since what the name means may change before it is opened.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DocumentError(path, "is not a regular file (a pipe, socket or device)")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb", buffering=0) as file:
            for _ in range(2):
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise DocumentError(path, "is not a regular file (a pipe, socket or device)")
                if before.st_size > limit:
                    raise DocumentError(path, f"has {before.st_size:,} bytes, and {most}")
                file.seek(0)
                data = _read_all(file, limit)
                after = os.fstat(file.fileno())
                if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(data) == after.st_size:
                    return data
    except OSError as error:
        raise DocumentError(path, f"cannot be read: {error.strerror or error}") from error
    raise DocumentError(path, "changed while it was read, twice; read it again when nothing writes to it")


def _read_all(file: RawIOBase, limit: int) -> bytes:
    """All that is left of a file, but hardly more than `limit` bytes, should it be growing."""
    parts: list[bytes] = []
    left = limit + 1
    while left > 0:
        part = file.read(min(left, 16 << 20))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _nothing(given: list[str | os.PathLike[str]], problems: list[Problem]) -> DocumentError:
    """What to say where no file could be read."""
    if len(problems) == 1:
        return DocumentError(*problems[0])
    names = ", ".join(os.fspath(path) for path in given[:3]) + (", ..." if len(given) > 3 else "")
    if not problems:
        return DocumentError(names or "no path", "has no files to read")
    few = "; ".join(f"{problem.file} {problem.message}" for problem in problems[:3])
    more = f"; and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    return DocumentError(names, f"none of {len(problems):,} files could be read: {few}{more}")
