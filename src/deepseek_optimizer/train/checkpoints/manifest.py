"""`checkpoint.json` lists every file of a checkpoint with its length and SHA-256. It is written last, and verified before
anything is loaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ...checkpoint.files import DataFile, read_json
from ...errors import CheckpointError
from .state import is_pickle, write_json

MANIFEST, VERSION = "checkpoint.json", 1
_CHUNK = 1 << 22


def write_manifest(directory: Path, step: int, processes: int) -> None:
    """Writes the manifest of a checkpoint.

    Args:
        step: number of optimizer steps.
        processes: number of processes that trained the model.
    """
    files = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in _files(directory).items()}
    write_json(directory / MANIFEST, {"version": VERSION, "step": step, "processes": processes, "files": files})


def verify(directory: Path) -> None:
    """Verifies a checkpoint against its manifest. Reads every file once.

    Raises:
        CheckpointError: the manifest is missing, or a file is missing, damaged, not listed, or pickled. Names the file.
    """
    if not directory.is_dir():
        raise CheckpointError("does not exist", file=directory)
    files = _files(directory)
    if MANIFEST not in files:
        raise CheckpointError(_no_manifest(files), file=directory)
    content = read_json(directory, MANIFEST)
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"has version {content.get('version')!r}, but this release supports {VERSION}", file=directory / MANIFEST
        )
    listed = content.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise CheckpointError("has no list of files; the checkpoint is damaged", file=directory / MANIFEST)
    for name in sorted(files.keys() - listed.keys() - {MANIFEST}):
        raise CheckpointError(f"is not listed in {MANIFEST}, so it was added later; remove it", file=files[name])
    for name, entry in listed.items():
        if name not in files:
            raise CheckpointError("is missing, but listed in the manifest", file=directory / name)
        if is_pickle(name):
            raise CheckpointError("is pickled, so opening it could run code; remove it", file=files[name])
        size = files[name].stat().st_size
        if size != entry.get("bytes"):
            raise CheckpointError(f"is damaged: {size} bytes instead of {entry.get('bytes')}", file=files[name])
        if _digest(files[name]) != entry.get("sha256"):
            raise CheckpointError("is damaged: its SHA-256 differs from the manifest", file=files[name])


def _no_manifest(files: dict[str, Path]) -> str:
    if any(is_pickle(name) for name in files):
        return (
            f"has no {MANIFEST}, but pickled state of another trainer, which is not opened because it could run code; start a "
            "new run from its weights with from_pretrained(directory)"
        )
    return f"has no {MANIFEST}; it is incomplete, or was written by another program"


def _files(directory: Path) -> dict[str, Path]:
    """The files below a directory, by relative path with forward slashes."""
    paths = (Path(root, name) for root, _, names in os.walk(directory) for name in sorted(names))
    return {path.relative_to(directory).as_posix(): path for path in paths}


def _digest(path: Path) -> str:
    """SHA-256 of a regular file, read in chunks."""
    file, digest = DataFile(path), hashlib.sha256()
    try:
        for at in range(0, file.size, _CHUNK):
            digest.update(file.read_tensor(at, min(_CHUNK, file.size - at)).numpy().data)
    finally:
        file.close()
    return digest.hexdigest()
