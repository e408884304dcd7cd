"""Decides whether a KV cache may grow: memory that was free when it was created may be in use by now."""

from __future__ import annotations

import time
from collections.abc import Callable

from ...system.memory import FreeMemory, free_memory, less_reserve

STEP = 64 << 20  # bytes that a cache grows by at a time; limits are read once per step, which takes about 1 ms
_STALE_SECONDS = 1.0  # after a shortage, limits are read again after this time


class CheckedGrowth:
    """Implements `cache.Growth`. A cache grows in steps, as long as a reserve of memory stays free. Otherwise it is full:
    sequences wait or fail with an error, instead of the kernel killing the process.

    Args:
        block_bytes, num_blocks: size and number of the store's blocks.
        read: returns the memory that is free now, of the device that the store is on.
        held: returns how many blocks the store has memory for already (`KvStore.held_blocks`), which need no more.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        block_bytes: int,
        num_blocks: int,
        read: Callable[[], FreeMemory] = free_memory,
        held: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._block_bytes, self._num_blocks, self._read, self._held = block_bytes, num_blocks, read, held
        self._clock = clock
        self._read_at = clock()
        self.shortage: str | None = None

    def grow(self, wanted: int, backed: int) -> int:
        """See `cache.Growth`."""
        backed = max(backed, self._held())
        if wanted <= backed:  # a device's store allocates all of its blocks at once
            self.shortage = None
            return backed
        limit = self._read().to_use
        room = max(0, less_reserve(limit.free)) // self._block_bytes
        step = -(-STEP // self._block_bytes)
        self._read_at = self._clock()
        self.shortage = None if backed + room >= wanted else f"there is no memory for more: {limit}"
        return backed if self.shortage else min(self._num_blocks, max(wanted, backed + min(room, step)))

    def is_stale(self) -> bool:
        """Whether the limits were last read so long ago that they should be read again."""
        return self._clock() - self._read_at >= _STALE_SECONDS
