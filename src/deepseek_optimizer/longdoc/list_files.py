"""Lists the files of a directory in order of names."""

from __future__ import annotations

import os
from collections.abc import Iterator

from .document import Problem

# Directories created by tools: packages, caches, version control. Names that start with a full stop are skipped too.
SKIPPED = frozenset(("node_modules", "__pycache__", "CVS"))
_ENVIRONMENT = "pyvenv.cfg"  # a directory that contains it is a Python virtual environment


def files_under(directory: str, problems: list[Problem]) -> Iterator[str]:
    """The files below a directory, depth first in order of names.

    Links are not followed: their targets are read at their own place or lie outside. Links to the outside, broken links and
    unreadable directories are reported in `problems`.
    """
    root = os.path.realpath(directory)
    stack = [_entries(directory, problems)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif entry.is_symlink():
            _note_link(entry.path, root, problems)
        elif entry.is_dir(follow_symlinks=False):
            stack.append(_entries(entry.path, problems))
        else:
            yield entry.path


def _entries(directory: str, problems: list[Problem]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(Problem(directory, f"cannot be read: {error.strerror or error}"))
        return iter(())
    if any(entry.name == _ENVIRONMENT for entry in entries):
        return iter(())
    return iter([entry for entry in entries if not entry.name.startswith(".") and entry.name not in SKIPPED])


def _note_link(path: str, root: str, problems: list[Problem]) -> None:
    target = os.path.realpath(path)
    if not os.path.lexists(target):
        problems.append(Problem(path, "is a broken link"))
    elif os.path.commonpath((root, target)) != root:
        problems.append(Problem(path, "is a link to outside the directory and was not followed; pass its target explicitly"))
