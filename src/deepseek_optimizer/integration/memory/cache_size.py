"""How far a model's cache may grow, and why that far."""

from __future__ import annotations

from dataclasses import dataclass

from ...backends.base import BLOCK_TOKENS
from ...errors import NotEnoughMemoryError
from ...system.memory import FreeMemory, less_reserve, mb

_MAX_BLOCKS = (1 << 31) // BLOCK_TOKENS - 1  # places in a cache are 32-bit numbers


@dataclass(frozen=True)
class CacheSize:
    """Attributes:
    bytes: that the cache may grow to; memory is taken as it is used.
    why: where the number comes from, in words.
    """

    bytes: int
    why: str

    def __str__(self) -> str:
        return f"grows to at most {mb(self.bytes)} ({self.why})"

    def blocks(self, block_bytes: int) -> int:
        """How many blocks that is. At least one."""
        return max(1, min(self.bytes // block_bytes, _MAX_BLOCKS))


def granted(memory: int) -> CacheSize:
    """What the settings say."""
    return CacheSize(memory, "kv_cache_memory")


def what_is_free(free: FreeMemory) -> CacheSize:
    """All that is free, less a reserve."""
    return CacheSize(max(0, less_reserve(free.free)), f"the {_free(free)}, less a reserve")


@dataclass(frozen=True)
class FullBatch:
    """Attributes:
    sequences: that run at once, at most.
    tokens: that each may have.
    bytes: of cache that they take.
    """

    sequences: int
    tokens: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.sequences:,} sequence{'' if self.sequences == 1 else 's'} of {self.tokens:,} tokens"


def for_batch(batch: FullBatch, free: FreeMemory, beside: int = 0) -> CacheSize:
    """What a server needs at most, within half of what is free.

    Args:
        free: memory as it is now.
        beside: bytes that another model's cache needs, out of the same half: each gets its share.
    """
    half = free.free // 2 * batch.bytes // (batch.bytes + beside)
    shared = ", shared with another model's" if beside else ""
    if batch.bytes <= half:
        return CacheSize(batch.bytes, f"{batch}; half of the {_free(free)} would be {mb(half)}{shared}")
    return CacheSize(half, f"half of the {_free(free)}{shared}; {batch} would take {mb(batch.bytes)}")


def _free(free: FreeMemory) -> str:
    limit = free.tightest
    return f"{mb(limit.free)} that " + ("are free" if limit.kind == "machine" else f"{limit.name} leaves free")


def check_granted(memory: int, free: FreeMemory) -> None:
    """Raises NotEnoughMemoryError where a server's cache could never have what its settings say."""
    if memory > free.free:
        raise _too_large(memory, free.free, free)


def check_reserved(size: CacheSize, free: FreeMemory) -> None:
    """Raises NotEnoughMemoryError where there is no address space for a cache: all of it is reserved at once, and used as it
    grows."""
    bound = free.to_reserve
    if bound is not None and size.bytes > bound.free:
        raise _too_large(size.bytes, bound.free, bound)


def _too_large(memory: int, free: int, limit: object) -> NotEnoughMemoryError:
    remedy = "ask for less with kv_cache_memory (--kv-cache-memory), leave it out for what fits, or free memory"
    return NotEnoughMemoryError("the KV cache", memory, free, remedy, limit)
