"""Files, directories and uploads to a document. What cannot be read becomes a problem of that file, and the others are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from .document import Document, TextFile

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

    Args:
        paths: one, or several. Directories are read with all that is in them, by name.
        limit_bytes: of a file, at most; a larger one is a problem of that file.
        limit_total: of all files, at most; what comes later is a problem of each file.
        progress: called with how many files are done, and how many there are.

    Raises:
        DocumentError: a path does not exist, or nothing could be read at all.
        MissingPackageError: a format needs a library that is not installed.
    """
    raise NotImplementedError


def read_upload(name: str, data: bytes) -> TextFile:
    """The text of bytes that were sent under a name; nothing is written to the disk or read from it.

    Raises:
        DocumentError: they could not be read; it names the file and says why.
        MissingPackageError: the format needs a library that is not installed.
    """
    raise NotImplementedError
