"""The prefix cache's second level, which outlives the process: where blocks are read from and written to. No torch."""

from __future__ import annotations

from typing import Protocol

from ...cache.prefix_cache import PrefixCache
from .memory import Memory
from .prefix_reader import PrefixReader
from .prefix_writer import PrefixWriter


class Store(Protocol):
    """Stores blocks and recurrent states by key, as `checkpoint.prefix_files.PrefixFiles` does. Its methods may be called by
    several threads. A part is named by the key of the prefix that ends with the block, and by the block's group of layers or
    `cache.prefix_parts.STATES`.

    Attributes:
        bytes: size of everything that is stored.
        written_files, written_bytes, evicted_files, damaged_files: counts since the start.
    """

    bytes: int
    written_files: int
    written_bytes: int
    evicted_files: int
    damaged_files: int

    def has(self, key: bytes, group: int) -> bool:
        """Whether a part is stored; it may turn out to be damaged when it is read."""

    def read(self, key: bytes, group: int) -> bytes | None:
        """The content of a part, exactly as it was written; None: it is not stored."""

    def touch(self, key: bytes, group: int, used_ns: int) -> bool:
        """Sets the time of a part's last use, in nanoseconds since the epoch; returns whether it is stored."""

    def write(self, key: bytes, group: int, content: bytes, used_ns: int) -> None:
        """Stores a part. Raises OSError if that fails."""


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

    def close(self, seconds: float) -> bool:
        """Ends the threads. Returns whether everything was written within `seconds`."""
        self.reader.close()
        return self.writer.close(seconds)
