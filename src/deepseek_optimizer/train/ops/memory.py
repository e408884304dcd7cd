"""Memory of what the ops of training make: a step's tensors lie where those of the step before lay.

The allocator of the C library puts aligned blocks of megabytes between small ones, so that the hole of a tensor is seldom taken
by the next of its size, and a process grows well past what it holds; and memory that is given back to the system is filled with
zeros, page by page, when it is taken again. Here tensors lie densely in segments of their own, a block takes the smallest hole
that it fits into, and neighbouring holes become one. Segments are asked to be of huge pages, and are given back by `trim`.
"""

from __future__ import annotations

import bisect
import functools
import mmap
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from ...errors import NotEnoughMemoryError
from ...system.memory import free_memory

_REMEDY: Final = "take shorter sequences or fewer of them a step"
_SEGMENT: Final = 256 << 20
LEAST: Final = 256 << 10  # bytes; what is smaller comes from torch
_UNIT: Final = 4096


@dataclass
class _Segment:
    """Attributes:
    starts, ends: of its holes, ascending; no two touch.
    """

    pages: mmap.mmap
    view: memoryview
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def best(self, size: int) -> tuple[int, int] | None:
        """(bytes left over, number of the hole) of the smallest hole of at least `size`."""
        return min(((e - s - size, i) for i, (s, e) in enumerate(zip(self.starts, self.ends, strict=True)) if e - s >= size),
                   default=None)  # fmt: skip

    def take(self, hole: int, size: int) -> int:
        start = self.starts[hole]
        if start + size == self.ends[hole]:
            del self.starts[hole], self.ends[hole]
        else:
            self.starts[hole] = start + size
        return start

    def give(self, start: int, end: int) -> None:
        at = bisect.bisect(self.starts, start)
        if at < len(self.starts) and self.starts[at] == end:
            end = self.ends.pop(at)
            del self.starts[at]
        if at and self.ends[at - 1] == start:
            self.ends[at - 1] = end
        else:
            self.starts.insert(at, start)
            self.ends.insert(at, end)


class TensorMemory:
    """Makes uninitialised tensors. Each keeps its block until its storage is gone, whoever holds it, in whatever thread."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._lock = threading.Lock()
        # where blocks come back: at any moment, even while a lock is held, for garbage is collected where it pleases Python
        self._returned: deque[tuple[_Segment, int, int]] = deque()
        self._alive: dict[int, Any] = {}

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """[shape] on the CPU, contiguous. Raises NotEnoughMemoryError."""
        count = torch.Size(shape).numel()
        size = -(-count * dtype.itemsize // _UNIT) * _UNIT
        if size < LEAST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with self._lock:
            segment, start = self._find(size)
        block = segment.view[start : start + size]
        key = id(block)
        self._alive[key] = weakref.ref(block, functools.partial(self._gone, key, segment, start, start + size))
        return torch.frombuffer(block, dtype=dtype, count=count).view(shape)

    def trim(self) -> None:
        """Gives the memory of segments in which nothing lies back to the system."""
        with self._lock:
            self._reclaim()
            self._segments = [s for s in self._segments if s.ends != [len(s.view)] or s.starts != [0]]

    def held(self) -> int:
        """Bytes of all segments."""
        return sum(len(segment.view) for segment in self._segments)

    def used(self) -> int:
        """Bytes of the blocks in them."""
        with self._lock:
            self._reclaim()
            return self.held() - sum(e - s for g in self._segments for s, e in zip(g.starts, g.ends, strict=True))

    def _find(self, size: int) -> tuple[_Segment, int]:
        self._reclaim()
        fits = [(*found, segment) for segment in self._segments if (found := segment.best(size)) is not None]
        if fits:
            _, hole, segment = min(fits, key=lambda fit: fit[0])
            return segment, segment.take(hole, size)
        segment = _new_segment(max(size, _SEGMENT))
        self._segments.append(segment)
        return segment, segment.take(0, size)

    def _gone(self, key: int, segment: _Segment, start: int, end: int, _: Any) -> None:
        self._alive.pop(key, None)
        self._returned.append((segment, start, end))

    def _reclaim(self) -> None:
        while self._returned:
            segment, start, end = self._returned.popleft()
            segment.give(start, end)


def _new_segment(size: int) -> _Segment:
    # Private: of Python's default, which is shared, a process that is forked would write into the tensors of the other.
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, size, **own)
    except OSError as error:
        memory = free_memory()
        raise NotEnoughMemoryError("a tensor of training", size, memory.free, _REMEDY, memory) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return _Segment(pages, memoryview(pages), [0], [size])


@functools.cache
def memory() -> TensorMemory:
    """The process's."""
    return TensorMemory()
