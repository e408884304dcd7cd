"""The maximum size of a model's KV cache, and the reason for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...backends.base import BLOCK_TOKENS
from ...errors import NotEnoughMemoryError
from ...system.memory import FreeMemory, less_reserve, mb

SLOTS_PER_SEQUENCE = 4  # of recurrent states: the latest, the one after the last full block, and two for the prefix cache
_STATE_SHARE, _MAX_SLOTS = 0.3, 1 << 16  # of a cache's memory, where the batch is not known
_MAX_BLOCKS = (1 << 31) // BLOCK_TOKENS - 1  # token slots in a cache are 32-bit integers


@dataclass(frozen=True)
class CacheSize:
    """The maximum size of a KV cache.

    Attributes:
        bytes: the maximum; memory is allocated as it is used.
        why: the reason, in words.
        state_share: the part of it that is for recurrent states, if the model has them.
    """

    bytes: int
    why: str
    state_share: float = _STATE_SHARE

    def __str__(self) -> str:
        return f"grows to at most {mb(self.bytes)} ({self.why})"

    def slots(self, state_bytes: int) -> int:
        """The number of slots of `state_bytes` for recurrent states, in a part of the memory; 0 for a model without them.

        Raises:
            NotEnoughMemoryError: there is not enough for one sequence.
        """
        if not state_bytes:
            return 0
        if SLOTS_PER_SEQUENCE * state_bytes > self.bytes:
            remedy = "set a larger kv_cache_memory (--kv-cache-memory), or free memory"
            raise NotEnoughMemoryError(
                "the recurrent states of a sequence", SLOTS_PER_SEQUENCE * state_bytes, self.bytes, remedy, self.why
            )
        return max(SLOTS_PER_SEQUENCE, min(round(self.bytes * self.state_share) // state_bytes, _MAX_SLOTS))

    def blocks(self, block_bytes: int) -> int:
        """The number of blocks of `block_bytes` that fit, at least one."""
        return max(1, min(self.bytes // block_bytes, _MAX_BLOCKS))


def with_states(blocks: int, states: int, sequences: int) -> int:
    """The size to grant to a cache so that it has `blocks` bytes for blocks, and `states` for the states of `sequences`
    sequences."""
    if not states:
        return blocks
    size = max(blocks + states, math.ceil(blocks / (1 - _STATE_SHARE)))
    return size if sequences == 1 else max(size, math.ceil(states / _STATE_SHARE))


def granted(memory: int) -> CacheSize:
    """The size set by `kv_cache_memory`, in bytes."""
    return CacheSize(memory, "kv_cache_memory")


def what_is_free(free: FreeMemory) -> CacheSize:
    """All free memory, less a reserve."""
    return CacheSize(max(0, less_reserve(free.free)), f"the {_free(free)}, less a reserve")


@dataclass(frozen=True)
class FullBatch:
    """The largest batch that an engine may run.

    Attributes:
        sequences: maximum number of sequences at a time.
        tokens: maximum number of tokens of each.
        bytes: cache memory that they need.
        states: what of it their recurrent states need.
    """

    sequences: int
    tokens: int
    bytes: int
    states: int = 0

    def __str__(self) -> str:
        return f"{self.sequences:,} sequence{'' if self.sequences == 1 else 's'} of {self.tokens:,} tokens"


def for_batch(batch: FullBatch, free: FreeMemory, beside: int = 0) -> CacheSize:
    """The size that a full batch needs, limited to half of the free memory.

    Args:
        batch: the full batch.
        free: the memory that is free now.
        beside: bytes that another model's cache needs; the two share the half in proportion.
    """
    half = free.free // 2 * batch.bytes // (batch.bytes + beside)
    shared, share = ", shared with another model's" if beside else "", batch.states / batch.bytes
    if batch.bytes <= half:
        return CacheSize(batch.bytes, f"{batch}; half of the {_free(free)} would be {mb(half)}{shared}", share)
    return CacheSize(half, f"half of the {_free(free)}{shared}; {batch} would take {mb(batch.bytes)}", share)


def _free(free: FreeMemory) -> str:
    limit = free.tightest
    return f"{mb(limit.free)} that " + ("are free" if limit.kind == "machine" else f"{limit.name} leaves free")


def check_granted(memory: int, free: FreeMemory) -> None:
    """Raises NotEnoughMemoryError if less memory is free than the settings request for the cache."""
    if memory > free.free:
        raise _too_large(memory, free.free, free)


def check_reserved(size: CacheSize, free: FreeMemory) -> None:
    """Raises NotEnoughMemoryError if there is too little address space for a cache, which is reserved as a whole at once."""
    bound = free.to_reserve
    if bound is not None and size.bytes > bound.free:
        raise _too_large(size.bytes, bound.free, bound)


def _too_large(memory: int, free: int, limit: object) -> NotEnoughMemoryError:
    remedy = "set a smaller kv_cache_memory (--kv-cache-memory), leave it out to use what fits, or free memory"
    return NotEnoughMemoryError("the KV cache", memory, free, remedy, limit)
