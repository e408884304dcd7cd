"""The prefix cache's second level, which outlives the process: where blocks are read from and written to. No torch."""

from __future__ import annotations

from ...cache.prefix_cache import PrefixCache
from .memory import Memory
from .prefix_reader import PrefixReader
from .prefix_writer import PrefixWriter
from .store import Store

WRITE_SECONDS = 30.0  # maximum time to write the rest of the prefix cache


class PrefixStore:
    """
    Args:
        store: where the blocks are stored.
        memory: the cache memory.
        prefix: the prefix cache.
    """

    def __init__(self, store: Store, memory: Memory, prefix: PrefixCache) -> None:
        self.store = store
        self.reader, self.writer = PrefixReader(store, memory, prefix), PrefixWriter(store, memory, prefix)

    def flush(self) -> None:
        """Writes what is queued, and stops reading: to be called before the prefix cache is cleared."""
        self.writer.flush(WRITE_SECONDS)
        self.reader.stop()

    def close(self, seconds: float) -> bool:
        """Ends the threads. Returns whether everything was written within `seconds`."""
        self.reader.close()
        return self.writer.close(seconds)
