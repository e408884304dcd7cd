"""Allocators of large tensors in huge pages: for packed weights, and for outputs of the training ops.

Tensors are packed densely into segments of their own: a block takes the smallest free range that fits (best fit), and adjacent
free ranges are merged. Segments request huge pages, which one mapping per tensor would have only between its ends.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import mmap
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from ..errors import NotEnoughMemoryError
from .memory import free_memory
from .pages import private_pages

MIN_BYTES: Final = 256 << 10  # smaller tensors are allocated by torch
_UNIT: Final = 4096
_HUGE_PAGE: Final = 2 << 20


@dataclass(eq=False)
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

    @property
    def unused(self) -> bool:
        return self.starts == [0] and self.ends == [len(self.view)]

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
    """Allocates uninitialized tensors. A block is freed with the tensor's storage, in whatever thread that happens.

    Args:
        what, remedy: for the error if there is not enough memory.
        segment: bytes of a segment; larger tensors have one each.
        returns: whether the pages of a block are returned to the system when it is freed. Otherwise they are kept for the next
            tensor, since the system would clear them again, until `trim`.
    """

    def __init__(self, what: str, remedy: str, *, segment: int, returns: bool) -> None:
        self._what, self._remedy, self._segment, self._returns = what, remedy, segment, returns
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
            self._segments = [segment for segment in self._segments if not segment.unused]

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
        segment = self._new_segment(-(-max(size, self._segment) // _HUGE_PAGE) * _HUGE_PAGE)
        self._segments.append(segment)
        return segment, segment.allocate(0, size)

    def _new_segment(self, size: int) -> _Segment:
        try:
            pages = private_pages(size)
        except OSError as error:
            memory = free_memory()
            raise NotEnoughMemoryError(self._what, size, memory.free, self._remedy, memory) from error
        return _Segment(pages, memoryview(pages), [0], [size])

    def _freed(self, key: int, segment: _Segment, start: int, end: int, _: Any) -> None:
        self._alive.pop(key, None)
        if self._returns and hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):  # pages that the process has locked (mlockall) are kept
                segment.pages.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._returned.append((segment, start, end))

    def _reclaim(self) -> None:
        while self._returned:
            segment, start, end = self._returned.popleft()
            segment.free(start, end)
            if self._returns and segment.unused:
                self._segments.remove(segment)


@functools.cache
def weight_memory() -> TensorMemory:
    """Of this process's packed weights."""
    return TensorMemory(
        "packed weights", "use a smaller model or a format with fewer bits", segment=64 << 20, returns=True
    )  # fmt: skip
