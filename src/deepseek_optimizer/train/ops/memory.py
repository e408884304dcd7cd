"""The allocator for outputs of the training ops. The tensors of a step reuse the memory of those of the previous step.

The C library's allocator places large aligned blocks between small ones, so that a freed block is seldom reused by the next
tensor of its size, and the process grows far beyond what it uses. Memory returned to the system is cleared, page by page, when
it is allocated again. Here tensors are packed densely into segments of their own: a block takes the smallest free range that
fits (best fit), and adjacent free ranges are merged. Segments request huge pages; `trim` returns unused ones to the system.
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
from ...system.pages import private_pages

_REMEDY: Final = "use shorter sequences or a smaller batch"
_SEGMENT: Final = 256 << 20
MIN_BYTES: Final = 256 << 10  # smaller tensors are allocated by torch
_UNIT: Final = 4096


@dataclass
class _Segment:
    """A mapped memory segment.

    Attributes:
        pages: the mapping.
        view: a view of all its bytes.
        starts, ends: bounds of its free ranges, ascending; no two are adjacent.
    """

    pages: mmap.mmap
    view: memoryview
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def best_fit(self, size: int) -> tuple[int, int] | None:
        """(remaining bytes, index) of the smallest free range of at least `size` bytes; None if there is none."""
        return min(((e - s - size, i) for i, (s, e) in enumerate(zip(self.starts, self.ends, strict=True)) if e - s >= size),
                   default=None)  # fmt: skip

    def allocate(self, index: int, size: int) -> int:
        start = self.starts[index]
        if start + size == self.ends[index]:
            del self.starts[index], self.ends[index]
        else:
            self.starts[index] = start + size
        return start

    def free(self, start: int, end: int) -> None:
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
    """Allocates uninitialized tensors. A block is freed with the tensor's storage, in whatever thread that happens."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._lock = threading.Lock()
        # freed blocks; the garbage collector may run anywhere, even while the lock is held
        self._returned: deque[tuple[_Segment, int, int]] = deque()
        self._alive: dict[int, Any] = {}

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized contiguous CPU tensor. Raises NotEnoughMemoryError."""
        count = torch.Size(shape).numel()
        size = -(-count * dtype.itemsize // _UNIT) * _UNIT
        if size < MIN_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with self._lock:
            segment, start = self._find(size)
        block = segment.view[start : start + size]
        key = id(block)
        self._alive[key] = weakref.ref(block, functools.partial(self._freed, key, segment, start, start + size))
        return torch.frombuffer(block, dtype=dtype, count=count).view(shape)

    def trim(self) -> None:
        """Returns empty segments to the system."""
        with self._lock:
            self._reclaim()
            self._segments = [s for s in self._segments if s.ends != [len(s.view)] or s.starts != [0]]

    def held(self) -> int:
        """Bytes of all segments."""
        return sum(len(segment.view) for segment in self._segments)

    def used(self) -> int:
        """Bytes of all allocated blocks."""
        with self._lock:
            self._reclaim()
            return self.held() - sum(e - s for g in self._segments for s, e in zip(g.starts, g.ends, strict=True))

    def _find(self, size: int) -> tuple[_Segment, int]:
        self._reclaim()
        fits = [(*fit, segment) for segment in self._segments if (fit := segment.best_fit(size)) is not None]
        if fits:
            _, index, segment = min(fits, key=lambda fit: fit[0])
            return segment, segment.allocate(index, size)
        segment = _new_segment(max(size, _SEGMENT))
        self._segments.append(segment)
        return segment, segment.allocate(0, size)

    def _freed(self, key: int, segment: _Segment, start: int, end: int, _: Any) -> None:
        self._alive.pop(key, None)
        self._returned.append((segment, start, end))

    def _reclaim(self) -> None:
        while self._returned:
            segment, start, end = self._returned.popleft()
            segment.free(start, end)


def _new_segment(size: int) -> _Segment:
    try:
        pages = private_pages(size)
    except OSError as error:
        memory = free_memory()
        raise NotEnoughMemoryError("a tensor of training", size, memory.free, _REMEDY, memory) from error
    return _Segment(pages, memoryview(pages), [0], [size])


@functools.cache
def memory() -> TensorMemory:
    """The allocator of this process."""
    return TensorMemory()
