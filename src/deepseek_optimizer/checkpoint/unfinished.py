"""Resumable writing of a directory: files that were finished before a kill are verified and reused.

`.<name>.unfinished.tmp` beside the target holds finished files in `files/`, and a journal. The journal's first line identifies
the job (inputs and settings); each further line names a finished file with its size and checksum. A run of the same job resumes
from there, a different job starts over. At the end `files/` is renamed to the target in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from .atomic import check_free, naming, publish, sync
from .locks import HAS_LOCKS, hold

_JOURNAL, _FILES = "journal.jsonl", "files"
_MAX_JOURNAL = 64 << 20
_CHUNK = 1 << 24


class Unfinished:
    """Context manager. After an error that a second run may avoid (no space, Ctrl-C), finished files are kept.

    Args:
        target: the directory to create in the end.
        identity: inputs and settings of the job, as JSON types; a leftover with the same identity is resumed.
        names: names of files that are worth resuming for.
        overwrite: whether the target may exist.

    Attributes:
        folder: directory for all files of the target.
        finished: names of the files that are complete.
        news: a message for the user about leftovers of an earlier run; None if there were none.

    Raises:
        CheckpointError: the target exists, or another process is writing it.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any], names: Collection[str], overwrite: bool = False) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.parent / f".{self.target.name}.unfinished.tmp"
        self.folder = self.path / _FILES
        self.overwrite = overwrite
        check_free(self.target, overwrite)
        self._handle = _locked(self.path, self.target)
        try:
            self.news, entries = self._take_over(json.loads(json.dumps(identity)), names)
        except BaseException:
            self._unlock()
            raise
        self.finished = set(entries)

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        worth_keeping = kind is not None and issubclass(kind, (OSError, KeyboardInterrupt, MemoryError)) and self.finished
        if not worth_keeping:
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[_Checked]:
        """A binary file for sequential writing. It gets its name, and its entry in the journal, when it is complete."""
        part = self.folder / f"{name}.part"
        with naming(part):
            with open(part, "wb") as raw:
                checked = _Checked(raw)
                yield checked
                raw.flush()
                os.fsync(raw.fileno())
            os.replace(part, self.folder / name)
            sync(self.folder)
        with naming(self.path / _JOURNAL), open(self.path / _JOURNAL, "ab") as journal:
            journal.write(_line(_entry(name, checked.count, checked.hash.hexdigest())))
            journal.flush()
            os.fsync(journal.fileno())
        self.finished.add(name)

    def publish(self) -> None:
        """Renames `folder` to the target."""
        publish(self.folder, self.target, self.overwrite)

    def _unlock(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _take_over(self, identity: dict[str, Any], names: Collection[str]) -> tuple[str | None, dict[str, dict[str, Any]]]:
        """Keeps files that can be reused, removes all others, and rewrites the journal accordingly."""
        before, entries = self._read_journal()
        news, kept = None, {}
        if before == identity:
            kept = {n: e for n, e in entries.items() if n in names and self._is_whole(n, e)}
            news = f"resuming {self.path}: {len(kept)} of {len(names)} files are finished"
            if damaged := sorted(n for n in entries if n in names and n not in kept):
                news += f"; damaged, will be written again: {', '.join(damaged)}"
        elif before is not None:
            other = [name for name in identity if before.get(name) != identity[name]]
            news = f"{self.path} was left by a conversion with another {' and '.join(other) or 'identity'}: starting over"
        elif any(self.path.iterdir()):
            news = f"{self.path} was left by an earlier run, and its journal cannot be read: starting over"
        for path in self.path.iterdir():
            if path != self.folder and not (path.name == _JOURNAL and stat.S_ISREG(_mode(path))):
                _remove(path)
        if not stat.S_ISDIR(_mode(self.folder)):
            _remove(self.folder)
            self.folder.mkdir()
        for path in self.folder.iterdir():
            if path.name not in kept:
                _remove(path)
        self._write_journal({"identity": identity}, *kept.values())
        return news, kept

    def _read_journal(self) -> tuple[Any, dict[str, dict[str, Any]]]:
        """The identity (None if it cannot be read), and the readable entries."""
        path = self.path / _JOURNAL
        if not stat.S_ISREG(_mode(path)) or path.stat().st_size > _MAX_JOURNAL:
            return None, {}
        lines = []
        for text in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(text))
            except (ValueError, RecursionError):  # the last line of a killed run may be half written
                lines.append(None)
        if not lines or not isinstance(lines[0], dict) or not isinstance(lines[0].get("identity"), dict):
            return None, {}
        entries = [e for e in lines[1:] if isinstance(e, dict) and isinstance(e.get("file"), str)]
        return lines[0]["identity"], {e["file"]: e for e in entries}

    def _write_journal(self, *lines: Mapping[str, Any]) -> None:
        """Replaces the journal atomically: a kill must not lose finished files."""
        part = self.path / f"{_JOURNAL}.part"
        with naming(part):
            with open(part, "wb") as journal:
                journal.write(b"".join(map(_line, lines)))
                journal.flush()
                os.fsync(journal.fileno())
            os.replace(part, self.path / _JOURNAL)
            sync(self.path)

    def _is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        """Whether the file has the size and checksum of the entry."""
        path = self.folder / name
        if not stat.S_ISREG(_mode(path)) or path.stat().st_size != entry.get("bytes"):
            return False
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
        return _entry(name, path.stat().st_size, digest.hexdigest()) == entry


class _Checked:
    """Counts and hashes the bytes written to a file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.count, self.hash = raw, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview, /) -> None:
        self._raw.write(data)
        self.hash.update(data)
        self.count += memoryview(data).nbytes


def _entry(name: str, size: int, digest: str) -> dict[str, Any]:
    return {"file": name, "bytes": size, "sha256": digest}


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _mode(path: Path) -> int:
    """File mode without following links; 0 if the path does not exist."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> None:
    if stat.S_ISDIR(_mode(path)):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _locked(path: Path, target: Path) -> int | None:
    """Creates the directory if necessary and locks it until the returned handle is closed or the process ends."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            pass
        if not stat.S_ISDIR(_mode(path)):
            raise CheckpointError("exists where a temporary directory has to be created; remove it", file=path)
        if not HAS_LOCKS:
            return None
        try:
            return hold(path)
        except BlockingIOError as error:
            raise CheckpointError("is being written by another process", file=target) from error
        except FileNotFoundError:
            continue  # the previous holder finished and removed it meanwhile
        except OSError:
            return None  # a file system without locks
