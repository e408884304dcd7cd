"""Whether a cache may grow: memory that was free when it was made may be others' by now."""

from __future__ import annotations

import time
from collections.abc import Callable

from ...system.memory import FreeMemory, free_memory, less_reserve

STEP = 64 << 20  # bytes that a cache grows by at once: limits are read that often, and each reading takes a millisecond
_AGAIN = 1.0  # seconds until somebody looks again, after there was too little


class CheckedGrowth:
    """Meets `cache.Growth`. A cache grows in steps, and stops where less than a reserve would stay free: it is full then, which
    sequences wait for or are told of, where the kernel would end the whole process.

    Args:
        block_bytes, num_blocks: of the store.
        read: the limits as they are now.
        clock: seconds.
    """

    def __init__(
        self,
        block_bytes: int,
        num_blocks: int,
        read: Callable[[], FreeMemory] = free_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._block_bytes, self._num_blocks, self._read, self._clock = block_bytes, num_blocks, read, clock
        self._looked = clock()
        self.shortage: str | None = None

    def grow(self, wanted: int, backed: int) -> int:
        """See `cache.Growth`."""
        limit = self._read().to_use
        room = max(0, less_reserve(limit.free)) // self._block_bytes
        step = -(-STEP // self._block_bytes)
        self._looked = self._clock()
        self.shortage = None if backed + room >= wanted else f"memory for more is short: {limit}"
        return backed if self.shortage else min(self._num_blocks, max(wanted, backed + min(room, step)))

    def look_again(self) -> bool:
        """Whether it is long ago that somebody looked."""
        return self._clock() - self._looked >= _AGAIN
