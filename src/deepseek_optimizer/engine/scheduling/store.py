"""Where blocks and recurrent states are stored beyond this process. No torch."""

from __future__ import annotations

from typing import Protocol


class Store(Protocol):
    """Stores blocks and recurrent states by key, as `checkpoint.prefix_files.PrefixFiles` does. Its methods may be called by
    several threads. A part is named by the key of the prefix that ends with the block, and by the block's group of layers or
    `cache.prefix_parts.STATES`.

    Attributes:
        size: bytes of everything that is stored.
        written_files, written_bytes, evicted_files, damaged_files: counts since the start.
    """

    size: int
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
