"""`checkpoint.json`: every file of a checkpoint with its length and SHA-256, written last, checked before anything is read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ...checkpoint.files import DataFile, read_json
from ...errors import CheckpointError
from .state import is_pickle, write_json

MANIFEST, VERSION = "checkpoint.json", 1
_PIECE = 1 << 22


def write_manifest(directory: Path, step: int, processes: int) -> None:
    """Lists all files that lie in a checkpoint.

    Args:
        step: optimizer steps that were done.
        processes: that trained it.
    """
    files = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in _files(directory).items()}
    write_json(directory / MANIFEST, {"version": VERSION, "step": step, "processes": processes, "files": files})


def verify(directory: Path) -> None:
    """Reads the whole checkpoint once, and compares it with its list.

    Raises:
        CheckpointError: the list is missing, a file is missing, damaged, not listed, or pickled. Names the file.
    """
    if not directory.is_dir():
        raise CheckpointError("there is no such checkpoint", file=directory)
    found = _files(directory)
    if MANIFEST not in found:
        raise CheckpointError(_without_list(found), file=directory)
    content = read_json(directory, MANIFEST)
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"is of version {content.get('version')!r}; this release knows {VERSION}", file=directory / MANIFEST
        )
    listed = content.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise CheckpointError("does not list files", file=directory / MANIFEST)
    for name in sorted(found.keys() - listed.keys() - {MANIFEST}):
        raise CheckpointError(f"is not listed in {MANIFEST}: it came later, and is not trusted; remove it", file=found[name])
    for name, entry in listed.items():
        if name not in found:
            raise CheckpointError("is listed but missing", file=directory / name)
        if is_pickle(name):
            raise CheckpointError("is pickled: it could run code when opened; checkpoints hold no such files", file=found[name])
        size = found[name].stat().st_size
        if size != entry.get("bytes"):
            raise CheckpointError(f"is damaged: it has {size} bytes instead of {entry.get('bytes')}", file=found[name])
        if _digest(found[name]) != entry.get("sha256"):
            raise CheckpointError("is damaged: its bytes are not those that were written (SHA-256 differs)", file=found[name])


def _without_list(found: dict[str, Path]) -> str:
    if any(is_pickle(name) for name in found):
        return (
            f"holds pickled state of another trainer and no {MANIFEST}; it is not opened, since it could run code. Begin a new "
            "run from its weights: from_pretrained(directory)"
        )
    return f"has no {MANIFEST}: it is incomplete, or another program's"


def _files(directory: Path) -> dict[str, Path]:
    """Files below a directory by their relative names, which use forward slashes."""
    paths = (Path(root, name) for root, _, names in os.walk(directory) for name in sorted(names))
    return {path.relative_to(directory).as_posix(): path for path in paths}


def _digest(path: Path) -> str:
    """SHA-256 of a regular file, read in pieces."""
    file, digest = DataFile(path), hashlib.sha256()
    try:
        for at in range(0, file.size, _PIECE):
            digest.update(file.read_tensor(at, min(_PIECE, file.size - at)).numpy().data)
    finally:
        file.close()
    return digest.hexdigest()
