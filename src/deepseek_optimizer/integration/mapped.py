"""Giving back memory of files that Transformers maps: their pages count as this process's own once they were touched."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_EVERY_BYTES = 64 << 20  # read between two sweeps: a sweep costs a millisecond or two


class MappedFiles:
    """The mappings of some files in this process, whoever made them. Does nothing where the system tells of none (not Linux).

    A page that is given back comes again from the system's page cache when it is touched. The files must not be written to
    through these mappings: a private copy of a page would be lost.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._read = 0

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
        for begin, end in self._ranges():
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)  # a refusal costs memory only

    def _ranges(self) -> list[tuple[int, int]]:
        try:
            lines = os.fsdecode(_MAPS.read_bytes()).splitlines()
        except OSError:
            return []
        ranges = []
        for line in lines:
            fields = line.split(maxsplit=5)  # begin-end, rights, offset, device, inode, path
            if len(fields) == 6 and fields[5] in self._files:
                begin, end = fields[0].split("-")
                ranges.append((int(begin, 16), int(end, 16)))
        return ranges
