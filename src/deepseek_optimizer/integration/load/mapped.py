"""Files that Transformers maps while it loads: their pages count as this process's own once they were touched, and a page that
the file has no more kills the process. Both is looked after here, and no tensor of the model is left in them."""

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
_EVERY_BYTES = 64 << 20  # read between two sweeps: a sweep costs a millisecond or two


class MappedFiles:
    """The mappings that Transformers makes of some files from now on. Does nothing where the system tells of none (not Linux).

    A page that is given back comes again from the system's page cache when it is touched. The files must not be written to
    through these mappings: a private copy of a page would be lost.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._facts = {file: _facts(file) for file in self._files}
        self._others = set(self._ranges())  # another model's: not ours to look after
        self._watched: dict[tuple[int, int], Callable[[], None]] | None = None
        self._read = 0

    def watch(self) -> None:
        """To be called once the files are mapped, before their tensors are read; more often does no harm. From then on a page
        that is gone reads as zeros, and `check` tells."""
        if self._watched is None:
            self._watched = {}
            if unavailable_reason() is None:
                for begin, end, file in set(self._ranges()) - self._others:
                    self._watched[begin, end] = mapped_file.watch(begin, end - begin, -1, 0, Path(file))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the mappings that are watched."""
        return tensor.device.type == "cpu" and any(b <= tensor.data_ptr() < e for b, e in self._watched or ())

    def check(self) -> None:
        """Raises CheckpointChangedError where a file is not what it was before it was read."""
        for file, facts in self._facts.items():
            if _facts(file) != facts:
                raise CheckpointChangedError("was changed while it was read", file=file)
        for begin, _ in self._watched or ():
            mapped_file.check_address(begin)

    def unwatch(self) -> None:
        """To be called when nothing reads the mappings any more."""
        for unwatch in (self._watched or {}).values():
            unwatch()
        self._watched = {}

    def __del__(self) -> None:
        self.unwatch()

    def was_read(self, nbytes: int) -> None:
        """Says that `nbytes` more were read and are needed no longer; now and then gives all pages back."""
        self._read += nbytes
        if self._read >= _EVERY_BYTES:
            self._read = 0
            self.give_back()

    def give_back(self) -> None:
        """All pages of the files leave this process's resident memory."""
        if not self._files or not hasattr(mmap, "MADV_DONTNEED"):
            return
        madvise = ctypes.CDLL(None).madvise
        for begin, end, _ in self._ranges():
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)  # a refusal costs memory only

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
    """By which a change of a file is seen."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
