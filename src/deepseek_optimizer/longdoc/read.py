"""Reads files, directories and uploads into a document. A file that cannot be read is reported, and the others are read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from io import RawIOBase

from ..errors import DocumentError
from . import readers
from .document import Document, Problem, TextFile
from .list_files import files_under
from .recognized import PageReader

LIMIT_BYTES = 128 << 20  # per file
LIMIT_TOTAL = 1 << 30  # of all files


def read_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    limit_bytes: int = LIMIT_BYTES,
    limit_total: int = LIMIT_TOTAL,
    progress: Callable[[int, int], None] | None = None,
    ocr: PageReader | None = None,
) -> Document:
    """Reads the text of files and directories.

    Directories are read recursively in order of names, without hidden files and those that tools create (`tree.SKIPPED`). Links
    in them are not followed. A file that is named twice is read once.

    Args:
        paths: one or several.
        limit_bytes: maximum size of a file, in bytes; a larger one is reported in `problems`.
        limit_total: maximum size of all files, in bytes; those beyond it are reported in `problems`.
        progress: called with the number of files done and the total.
        ocr: reads scanned pages of PDFs, and pictures; None: they are reported.

    Raises:
        DocumentError: a path does not exist, or no file could be read.
        BackendError: the OCR model failed.
        MissingPackageError: a format needs a library that is not installed.
    """
    named = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    problems: list[Problem] = []
    listed = _list_files([os.fspath(path) for path in named], problems)
    files: list[TextFile] = []
    left = limit_total
    for done, path in enumerate(listed):
        if progress is not None:
            progress(done, len(listed))
        try:
            limit = f"the limit is {limit_bytes:,} per file"
            if left < limit_bytes:
                limit = f"only {left:,} are left of the limit for all files"
            data = _bytes_of(path, min(limit_bytes, left), limit)
            left -= len(data)
            files.append(readers.read(path, data, ocr))
        except DocumentError as error:
            problems.append(Problem(error.file, error.message))
    if progress is not None:
        progress(len(listed), len(listed))
    if not files:
        raise _nothing_read(named, problems)
    return Document(tuple(files), tuple(problems))


def read_upload(name: str, data: bytes) -> TextFile:
    """The text of an uploaded file; nothing is written to disk or read from it.

    Raises:
        DocumentError: it could not be read; the message names the file and the reason.
        MissingPackageError: the format needs a library that is not installed.
    """
    return readers.read(name, data)


def _list_files(paths: list[str], problems: list[Problem]) -> list[str]:
    for path in paths:
        if not os.path.lexists(path):
            raise DocumentError(path, "does not exist")
    files: dict[str, str] = {}  # real path -> path
    for path in paths:
        for file in files_under(path, problems) if os.path.isdir(path) else (path,):
            files.setdefault(os.path.realpath(file) if len(paths) > 1 else file, file)
    return list(files.values())


def _bytes_of(path: str, limit: int, limit_text: str) -> bytes:
    """A consistent snapshot of a file's bytes.

    Args:
        limit_text: describes the limit in the error message.

    Raises:
        DocumentError: it cannot be read, is not a regular file, is too large, or keeps changing.
    """
    try:
        # A FIFO or a device may block or never end. O_NONBLOCK, since the file may be replaced before it is opened.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DocumentError(path, "is not a regular file (a pipe, socket or device)")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb", buffering=0) as file:
            for _ in range(2):
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise DocumentError(path, "is not a regular file (a pipe, socket or device)")
                if before.st_size > limit:
                    raise DocumentError(path, f"has {before.st_size:,} bytes, and {limit_text}")
                file.seek(0)
                data = _read_all(file, limit)
                after = os.fstat(file.fileno())
                if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(data) == after.st_size:
                    return data
    except OSError as error:
        raise DocumentError(path, f"cannot be read: {error.strerror or error}") from error
    raise DocumentError(path, "changed twice while being read; try again when no process writes to it")


def _read_all(file: RawIOBase, limit: int) -> bytes:
    """The rest of a file, but at most about `limit` bytes in case it is growing."""
    parts: list[bytes] = []
    left = limit + 1
    while left > 0:
        part = file.read(min(left, 16 << 20))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _nothing_read(paths: list[str | os.PathLike[str]], problems: list[Problem]) -> DocumentError:
    """The error if no file could be read."""
    if len(problems) == 1:
        return DocumentError(*problems[0])
    names = ", ".join(os.fspath(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    if not problems:
        return DocumentError(names, "has no files to read") if names else DocumentError("paths", "no path was given")
    few = "; ".join(f"{problem.file} {problem.message}" for problem in problems[:3])
    more = f"; and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    return DocumentError(names, f"none of {len(problems):,} files could be read: {few}{more}")
