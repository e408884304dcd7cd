"""Files that Transformers maps into memory while it loads a model.

Touched pages count as resident memory of this process, and access to a page beyond the end of a truncated file kills it.
`MappedFiles` releases the pages and turns the latter into an error; afterwards no tensor of the model is left in the mappings.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ...backends.cpu import mapped_file, unavailable_reason
from ...errors import CheckpointChangedError

_MAPS = Path("/proc/self/maps")
_EVERY_BYTES = 64 << 20  # bytes read between two releases of the pages, each of which takes 1 to 2 ms


class MappedFiles:
    """The mappings of some files that are created after this object. Without /proc/self/maps (not Linux) it does nothing.

    A released page is read again from the system's page cache when it is next touched. The mappings must not be written to:
    private copies of pages would be lost.

    Args:
        files: paths of the files.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._facts = {file: _facts(file) for file in self._files}
        self._others = set(self._ranges())  # existing mappings belong to other models
        self._watched: dict[tuple[int, int], Callable[[], None]] | None = None
        self._read = 0

    def watch(self) -> None:
        """Call after the files are mapped and before their tensors are read; repeated calls are harmless. From then on, pages
        beyond the end of a truncated file read as zeros, and `check` raises."""
        if self._watched is None:
            self._watched = {}
            if unavailable_reason() is None:
                for begin, end, file in set(self._ranges()) - self._others:
                    self._watched[begin, end] = mapped_file.watch(begin, end - begin, -1, 0, Path(file))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the watched mappings."""
        return tensor.device.type == "cpu" and any(b <= tensor.data_ptr() < e for b, e in self._watched or ())

    def check(self) -> None:
        """Raises CheckpointChangedError if a file was modified since this object was created."""
        for file, facts in self._facts.items():
            if _facts(file) != facts:
                raise CheckpointChangedError("was modified while it was read; load the model again", file=file)
        for begin, _ in self._watched or ():
            mapped_file.check_address(begin)

    def unwatch(self) -> None:
        """Call when the mappings are no longer read."""
        for unwatch in (self._watched or {}).values():
            unwatch()
        self._watched = {}

    def __del__(self) -> None:
        self.unwatch()

    def was_read(self, nbytes: int) -> None:
        """Call after reading `nbytes` that are no longer needed; releases all pages from time to time."""
        self._read += nbytes
        if self._read >= _EVERY_BYTES:
            self._read = 0
            self.release_pages()

    def release_pages(self) -> None:
        """Removes all pages of the files from this process's resident memory."""
        if not self._files or not hasattr(mmap, "MADV_DONTNEED"):
            return
        madvise = ctypes.CDLL(None).madvise
        for begin, end, _ in self._ranges():
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)  # a failure only costs memory

    def _ranges(self) -> list[tuple[int, int, str]]:
        """Begin, end and file of each mapping."""
        try:
            lines = os.fsdecode(_MAPS.read_bytes()).splitlines()
        except OSError:
            return []
        ranges = []
        for line in lines:
            fields = line.split(maxsplit=5)  # begin-end, rights, offset, device, inode, path
            if len(fields) == 6 and fields[5] in self._files:
                begin, end = fields[0].split("-")
                ranges.append((int(begin, 16), int(end, 16), fields[5]))
        return ranges


def _facts(file: str) -> tuple[int, ...] | None:
    """Device, inode, size and modification time of a file, to detect changes; None if it cannot be accessed."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
