"""Access to the files of a checkpoint, confined to its directory and to the size of each file.

Float checkpoints are read with pread, so that their pages never count as memory of this process, and a file that is truncated
while open gives an error instead of SIGBUS. Packed checkpoints are mapped and used in place if the backend can guard the
mapping (`backends/cpu/mapped_file.py`), and read otherwise. Copying them into anonymous memory was measured (1 GB, Zen 5, warm,
with and without huge pages): the first token took 0.9 s or more instead of 0.2 s, and decode gained 4 to 6 %.
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
_READ_BYTES = 1 << 30  # maximum bytes of one system call


class Mapper(Protocol):
    """Maps a whole file privately for reading, such that a change of the file becomes an error."""

    def __call__(self, fd: int, size: int, modified_ns: int, path: Path) -> Any:
        """Returns a writable buffer of `size` bytes.

        Args:
            size, modified_ns: size and modification time of the file when it was opened.

        Raises:
            CheckpointChangedError: the file has changed since.
        """


class DataFile:
    """A regular file, opened once: later changes of its name do not affect it."""

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
        self.mapping: Any = None  # made by a `Mapper` when the first tensor is mapped

    def close(self) -> None:
        """Closes the file; tensors that map it remain valid."""
        self._close()

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`, checked against the size before memory is allocated."""
        self._check(offset, count)
        data = bytearray(count)
        self._fill(offset, memoryview(data))
        return bytes(data)

    def read_tensor(self, offset: int, count: int) -> torch.Tensor:
        """`count` bytes at `offset` as a new uint8 tensor."""
        self._check(offset, count)
        out = torch.empty(count, dtype=torch.uint8, device="cpu")
        self._fill(offset, out.numpy().data)
        return out

    def read_strided(self, offset: int, stride: int, rows: int, count: int) -> torch.Tensor:
        """`count` bytes at each of `offset`, `offset + stride`, ..., as a new uint8 tensor [rows, count]."""
        self._check(offset, (rows - 1) * stride + count if rows else 0)
        out = torch.empty(rows, count, dtype=torch.uint8, device="cpu")
        view = memoryview(out.view(-1).numpy().data)
        for row in range(rows):
            self._fill(offset + row * stride, view[row * count : (row + 1) * count])
        return out

    def map_tensor(self, offset: int, count: int, mapper: Mapper) -> torch.Tensor:
        """`count` bytes at `offset`, mapped, as uint8. The mapping is private: writing to the tensor leaves the file as is."""
        self._check(offset, count)
        if count == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        if self.mapping is None:
            self.mapping = mapper(self._fd, self.size, self._modified_ns, self.path)
        return torch.frombuffer(self.mapping, dtype=torch.uint8, count=count, offset=offset)

    def check_unchanged(self) -> None:
        """Raises CheckpointChangedError if size or modification time differ from when the file was opened."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified_ns):
            raise CheckpointChangedError("was modified while it was being read", file=self.path)

    def _check(self, offset: int, count: int) -> None:
        if not 0 <= offset <= offset + count <= self.size:
            raise CheckpointError(
                f"is truncated: bytes {offset} to {offset + count} are needed, it has {self.size}; download it again",
                file=self.path,
            )

    def _fill(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = _read_at(self._fd, view[done : done + _READ_BYTES], offset + done)
            if count == 0:
                raise CheckpointChangedError("was truncated while it was being read", file=self.path)
            done += count


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

    Raises CheckpointError if the name leaves the directory: absolute, with `..`, or a symbolic link to the outside. The layout
    of the Hugging Face cache is accepted, where snapshots link to the `blobs` of the same repository.
    """
    if not name or re.search(r"[\0\\:]|^/|^\.\.(/|$)|/\.\.(/|$)", name):  # a colon or backslash means something on Windows
        raise CheckpointError(f"refers to the file {name!r}, which is not inside the checkpoint", file=directory)
    path = directory / name
    try:
        root, real = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"cannot be resolved: {error}", file=path) from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError("is a link to a file outside the checkpoint", file=path)
    return path


def parse_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parses a JSON object strictly: UTF-8, no duplicate keys, no NaN or infinity. `what` names it in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            seen: set[str] = set()
            duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{what} has a duplicate key {duplicate!r}", file=path)
        return parsed

    def refuse(constant: str) -> Any:
        raise CheckpointError(f"{what} contains {constant}, which is not valid JSON", file=path)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8: {error}", file=path) from error
    except RecursionError as error:
        raise CheckpointError(f"{what} is nested too deeply", file=path) from error
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
