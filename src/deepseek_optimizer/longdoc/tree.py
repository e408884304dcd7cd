"""The files of a directory, by name."""

from __future__ import annotations

import os
from collections.abc import Iterator

from .document import Problem

# What tools put into a tree: packages, caches, version control. Names that begin with a full stop are left out too.
LEFT_OUT = frozenset(("node_modules", "__pycache__", "CVS"))
_ENVIRONMENT = "pyvenv.cfg"  # a directory that has it is a virtual environment of Python


def files_under(directory: str, problems: list[Problem]) -> Iterator[str]:
    """The files under a directory: its own in the order of their names, a subdirectory's where its name stands in that order.

    Links are not followed: what they name is read in its own place, or lies outside. Outside ones, broken ones and directories
    that cannot be read are noted as problems.
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
    return iter([entry for entry in entries if not entry.name.startswith(".") and entry.name not in LEFT_OUT])


def _note_link(path: str, root: str, problems: list[Problem]) -> None:
    target = os.path.realpath(path)
    if not os.path.lexists(target):
        problems.append(Problem(path, "is a link to nothing"))
    elif os.path.commonpath((root, target)) != root:
        problems.append(Problem(path, "is a link out of the directory, and is not followed; name what it means itself"))
