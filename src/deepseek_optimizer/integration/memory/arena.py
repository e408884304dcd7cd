"""The KV memory of a model: the backend's block store, and the block manager that allocates its blocks to sequences."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ...backends.base import BLOCK_TOKENS, KvStore, Plan, StepBatch, StepOutput
from ...backends.decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ...cache import HOLE, BlockManager, Groups, SequenceBlocks
from ...errors import UnsupportedRequestError
from ...graph.rope_rotation import KeyRotation
from .cache_size import CacheSize
from .growth import CheckedGrowth

_MIN_INTERVAL = 4  # blocks


@dataclass(frozen=True)
class LatentRow:
    """Layout of a token's row in a latent cache: `rank` elements of the latent, then a rotated key.

    Attributes:
        rank: elements of the latent.
        paired: whether the two elements of each rotated pair are adjacent; Transformers' module stores all first elements
            before all second ones.
    """

    rank: int
    paired: bool


@dataclass(frozen=True)
class WindowRows:
    """The rows that a decoder layer with compressed attention reads by token, as both keys and values.

    Attributes:
        kind: index of these rows among the layers of the cache.
        window: number of tokens, the newest included, whose rows a token reads.
    """

    kind: int
    window: int


class Arena:
    """The KV memory that all caches of a model share. The block manager is used only through `locked`.

    Blocks of garbage-collected caches return through `reclaim`, which may run at any time in any thread, even during an
    allocation. It therefore only queues them; they are freed by the current or next holder of the lock.

    Args:
        store: the backend's block store.
        layers: number of the model's decoder layers with keys and values of their own; the store may have more.
        latent: layout of the rows of a latent cache; None: the cache holds keys and values.
        rotation: how the model rotates keys, for `drop_blocks`; None: unknown, `drop_blocks` is not supported.
        groups: for each group of the cache's layers, which tokens the sequences may drop; None: none.
        group_of: the group of a layer of the cache.
        size: the maximum size and its reason; None: the store's size.
        growth: decides whether there is memory for more blocks; None: by this system's limits.
        state_growth: the same for the slots of recurrent states.
        empty_layers: number of further decoder layers, whose attention reads the keys and values of the others.
        windows: with compressed attention, the rows of each decoder layer; `layers` is 0.

    Attributes:
        state_interval: see `SequenceStates`; so long that stored states take no more memory than the blocks between them. 0:
            the model has none.
    """

    def __init__(
        self,
        store: KvStore,
        layers: int,
        latent: LatentRow | None = None,
        rotation: KeyRotation | None = None,
        groups: Groups = (None,),
        size: CacheSize | None = None,
        growth: CheckedGrowth | None = None,
        state_growth: CheckedGrowth | None = None,
        empty_layers: int = 0,
        group_of: Callable[[int], int] = lambda _: 0,
        windows: tuple[WindowRows, ...] = (),
    ) -> None:
        self.group_of, self.windows = group_of, windows
        self.store, self.layers, self.latent, self.rotation = store, layers, latent, rotation
        self.empty_layers = empty_layers
        self.size = size or CacheSize(store.num_blocks * store.block_bytes, "the size of the block store")
        self._growth = growth or CheckedGrowth(store.block_bytes, store.num_blocks)
        slots, self.state_interval = None, 0
        if store.num_states:
            self._state_growth = state_growth or CheckedGrowth(store.state_bytes, store.num_states)
            slots = BlockManager(store.num_states, growth=self._state_growth, unit="state slot")
            bytes_of_all = len(groups) * store.block_bytes
            self.state_interval = max(_MIN_INTERVAL, -(-store.state_bytes // bytes_of_all)) * BLOCK_TOKENS
        self.manager = BlockManager(store.num_blocks, groups, self._growth, slots)
        self._lock = threading.Lock()
        self._store_lock = threading.Lock()  # acquired after _lock if both are needed
        self._release_due = False
        self._garbage: deque[list[SequenceBlocks]] = deque()

    @contextmanager
    def locked(self) -> Iterator[BlockManager]:
        """Yields the manager with the lock held and all garbage freed. Memory returns to the system when no block is in use."""
        with self._lock:
            self._sweep()
            if self.manager.limited and self._growth.is_stale():
                self.manager.lift_limit()
            if (slots := self.manager.slots) is not None and slots.limited and self._state_growth.is_stale():
                slots.lift_limit()
            yield self.manager
            self._sweep()
        if self._garbage:  # queued between the sweep and the release of the lock
            self._try_sweep()

    def reclaim(self, sequences: list[SequenceBlocks]) -> None:
        """Frees the blocks of `sequences`, now or as soon as the lock is free."""
        self._garbage.append(sequences)
        self._try_sweep()

    def release_unused(self) -> None:
        """Returns the memory of the store to the system if no block is in use."""
        self.reclaim([])

    def _try_sweep(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()

    def _sweep(self) -> None:
        while self._garbage:
            self._release_due = True
            for sequence in self._garbage.popleft():
                sequence.free()
        # The store may be in use, in this very thread if the garbage collector ran during a step: that user releases it then.
        if self._release_due and self._store_lock.acquire(blocking=False):
            try:
                self._release_due = False
                if self.manager.high_water == 0:
                    self.store.release(0)
                    self.manager.clear()
                if (slots := self.manager.slots) is not None and slots.high_water == 0:
                    self.store.release_states(0)
                    slots.clear()
            finally:
                self._store_lock.release()

    def run(self, plan: Plan, batch: StepBatch) -> StepOutput:
        """Runs one step. Steps are serialized, because a store may move its memory when it grows."""
        with self._store_lock:
            output = plan.run(batch, self.store)
        if self._release_due:
            self._try_sweep()
        return output

    def decode(self, plan: Plan, batch: StepBatch, call: DecodeCall) -> Decoded:
        """Runs several decode steps, as `run` does one."""
        with self._store_lock:
            decoded = plan.decode(batch, self.store, call)
        if self._release_due:
            self._try_sweep()
        return decoded

    def decode_drafted(
        self, plan: Plan, batch: StepBatch, drafter: Plan, pending: StepBatch, call: DraftedCall
    ) -> DraftedRounds:
        """Runs several rounds with drafts, as `run` does one step."""
        with self._store_lock:
            decoded = plan.decode_drafted(batch, drafter, pending, self.store, call)
        if self._release_due:
            self._try_sweep()
        return decoded

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copies the contents of shared blocks to new ones: pairs (source, target)."""
        if copies:
            with self._store_lock:
                for source, target in copies:
                    self.store.copy_block(source, target)

    def read_block(self, block: int) -> bytes:
        """See `KvStore.read_block`."""
        with self._store_lock:
            return self.store.read_block(block)

    def write_block(self, block: int, data: bytes) -> None:
        """See `KvStore.write_block`."""
        with self._store_lock:
            self.store.write_block(block, data)

    def read_state(self, slot: int) -> bytes:
        """See `KvStore.read_state`."""
        with self._store_lock:
            return self.store.read_state(slot)

    def write_state(self, slot: int, data: bytes) -> None:
        """See `KvStore.write_state`."""
        with self._store_lock:
            self.store.write_state(slot, data)

    def drop_blocks(self, sequence: SequenceBlocks, first_block: int, count: int, first_position: int = 0) -> None:
        """Drops `count` full blocks of a sequence from `first_block` on. The tokens after them move up: their keys are rotated
        back by 32 * count positions. Otherwise keys and values stay as computed with the whole text.

        Args:
            sequence: the sequence.
            first_block, count: the blocks to drop.
            first_position: RoPE position of the sequence's first token; the following tokens have consecutive positions.

        Raises (nothing was changed):
            CacheFullError: blocks after the gap are shared, and there are too few free blocks for copies of them.
            DroppedTokensError: tokens that were already dropped would enter a layer's window.
            UnsupportedRequestError: keys of this model cannot be moved to other positions.
        """
        rotation = self.rotation
        if rotation is None:
            raise UnsupportedRequestError(
                "the cached keys of this model cannot be moved to other positions; use it without cache_window"
            )
        end = first_block + count
        tokens, position = sequence.tokens - end * BLOCK_TOKENS, first_position + end * BLOCK_TOKENS
        rotation.check(first_position + sequence.tokens)

        def move(copies: list[tuple[int, int]], tables: list[list[int]]) -> None:
            with self._store_lock:
                for source, target in copies:
                    self.store.copy_block(source, target)
                for group, blocks in enumerate(tables):
                    held = [block for block in blocks if block != HOLE]
                    dropped = (len(blocks) - len(held)) * BLOCK_TOKENS  # holes come first
                    table, delta = np.array(held, np.int32), -count * BLOCK_TOKENS
                    self.store.rotate(rotation, table, tokens - dropped, position + dropped, delta, group)

        with self.locked():
            sequence.drop(first_block, count, move)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks and slots in use."""
        slots = self.manager.slots
        states = 0 if slots is None else (slots.num_blocks - slots.free_blocks) * self.store.state_bytes
        return (self.manager.num_blocks - self.manager.free_blocks) * self.store.block_bytes + states
