"""Files of a checkpoint: found inside its directory only, and read no further than they reach.

Float checkpoints are read with pread, so that their pages never count as this process's memory and a file cut short while
open is an error instead of a SIGBUS. Packed checkpoints are mapped where the backend can watch over the mapping
(`backends/cpu/mapped_file.py`): they are used in place. Elsewhere they are read like the others. Copying them into memory of
our own, huge pages or not, was measured (1 GB, Zen 5, warm): first token after 0.9 s or more instead of 0.2, for 4-6 % in
decode.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointChangedError, CheckpointError

_MAX_JSON_BYTES = 64 << 20  # an index of a million tensors stays below it
_READ_BYTES = 1 << 30  # most bytes one system call is asked for


class Mapper(Protocol):
    """Maps a whole file for reading, privately, and sees to it that a file which changes meanwhile is an error."""

    def __call__(self, fd: int, size: int, modified_ns: int, path: Path) -> Any:
        """A writable buffer of `size` bytes.

        Args:
            size, modified_ns: the file's when it was opened.

        Raises:
            CheckpointChangedError: it is not what it was then.
        """


class DataFile:
    """One regular file, opened once: its size is that of the file that is read, whatever happens to the name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:  # O_NONBLOCK: a FIFO must be refused, not waited for
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be opened: {error}", file=path) from error
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError("is not a regular file", file=path)
        self.size, self._modified_ns = status.st_size, status.st_mtime_ns
        self._map: Any = None

    def close(self) -> None:
        """Closes the file; tensors that map it stay good."""
        self._close()

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`; checked against the size before memory is taken."""
        self._check(offset, count)
        data = bytearray(count)
        self._fill(offset, memoryview(data))
        return bytes(data)

    def read_tensor(self, offset: int, count: int) -> torch.Tensor:
        """`count` bytes at `offset` as a fresh uint8 tensor."""
        self._check(offset, count)
        out = torch.empty(count, dtype=torch.uint8, device="cpu")
        self._fill(offset, out.numpy().data)
        return out

    def map_tensor(self, offset: int, count: int, mapper: Mapper) -> torch.Tensor:
        """`count` bytes at `offset` in place, uint8. The mapping is private: writing to the tensor leaves the file alone."""
        self._check(offset, count)
        if count == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._map is None:
            self._map = mapper(self._fd, self.size, self._modified_ns, self.path)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=offset)

    def check_unchanged(self) -> None:
        """Raises CheckpointChangedError where the file has another size or time of modification than when it was opened."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified_ns):
            raise CheckpointChangedError("was written to while it was read", file=self.path)

    def _check(self, offset: int, count: int) -> None:
        if not 0 <= offset <= offset + count <= self.size:
            raise CheckpointError(
                f"is truncated: bytes {offset} to {offset + count} are needed, it has {self.size}; fetch it again",
                file=self.path,
            )

    def _fill(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            got = _read_at(self._fd, view[done : done + _READ_BYTES], offset + done)
            if got == 0:
                raise CheckpointChangedError("was cut short while it was read", file=self.path)
            done += got


_SEEK_LOCK = threading.Lock()


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with _SEEK_LOCK:  # Windows: no positioned read
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def inside(directory: Path, name: str) -> Path:
    """The file `name` of a checkpoint directory.

    CheckpointError where the name leaves the directory: absolute, with `..`, or a symbolic link that leads out. The hub's
    cache is known: its snapshots link to the `blobs` of the same repository.
    """
    if not name or re.search(r"[\0\\:]|^/|^\.\.(/|$)|/\.\.(/|$)", name):  # a colon or backslash means something on Windows
        raise CheckpointError(f"names the file {name!r}, which is not inside the checkpoint", file=directory)
    path = directory / name
    try:
        root, real = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"cannot be resolved: {error}", file=path) from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError("is a link that leads out of the checkpoint", file=path)
    return path


def parse_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no key twice, no NaN or infinity. `what` names it in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{what} has the key {twice!r} twice", file=path)
        return made

    def refuse(constant: str) -> Any:
        raise CheckpointError(f"{what} holds {constant}, which is not JSON", file=path)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8: {error}", file=path) from error
    except RecursionError as error:
        raise CheckpointError(f"{what} is nested too deep", file=path) from error
    except CheckpointError:
        raise
    except ValueError as error:  # bad JSON, or a number of thousands of digits
        raise CheckpointError(f"{what} is not valid JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, not {type(value).__name__}", file=path)
    return value


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint."""
    file = DataFile(inside(directory, name))
    try:
        if file.size > _MAX_JSON_BYTES:
            raise CheckpointError(f"has {file.size} bytes, more than {_MAX_JSON_BYTES} for a JSON file", file=file.path)
        return parse_json(file.read(0, file.size), file.path, "the file")
    finally:
        file.close()
