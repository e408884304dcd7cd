"""One model's KV memory: the backend's block store, and the block manager that says whose each block is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ...backends.base import BLOCK_TOKENS, KvStore, Plan, StepBatch, StepOutput
from ...cache import HOLE, BlockManager, Forgetting, SequenceBlocks
from ...errors import UnsupportedRequestError
from ...graph.rotation import KeyRotation
from .cache_size import CacheSize
from .growth import CheckedGrowth


@dataclass(frozen=True)
class LatentRow:
    """A token's row as the store reads it: a latent of `rank` numbers, then a turned key. `paired`: the key's pairs lie side by
    side, where Transformers' own module has all first numbers before all second ones."""

    rank: int
    paired: bool


class Arena:
    """Shared by all caches of a model. Every use of the manager goes through `locked`.

    Blocks of a cache that was garbage collected come back through `reclaim`, which may run at any moment, in any thread, even
    in the midst of an allocation: so it only queues them, and whoever holds the lock, or takes it next, frees them.

    Args:
        layers: the model's own; the store may have more.
        latent: the shape of a latent cache's rows; None where it holds keys and values.
        rotation: how the model's keys were turned, for `drop_blocks`; None: it cannot be done.
        forgetting: what its sequences may forget; None: nothing.
        size: what it may grow to, and why that; None: the store's size.
        growth: finds out whether there is memory for more; None: by this system's limits.
    """

    def __init__(
        self,
        store: KvStore,
        layers: int,
        latent: LatentRow | None = None,
        rotation: KeyRotation | None = None,
        forgetting: Forgetting | None = None,
        size: CacheSize | None = None,
        growth: CheckedGrowth | None = None,
    ) -> None:
        self.store, self.layers, self.latent, self.rotation = store, layers, latent, rotation
        self.size = size or CacheSize(store.num_blocks * store.block_bytes, "all that was made for it")
        self._growth = growth or CheckedGrowth(store.block_bytes, store.num_blocks)
        self.manager = BlockManager(store.num_blocks, forgetting, self._growth)
        self._lock = threading.Lock()
        self._store_lock = threading.Lock()  # taken after _lock where both are
        self._release_due = False
        self._garbage: deque[list[SequenceBlocks]] = deque()

    @contextmanager
    def locked(self) -> Iterator[BlockManager]:
        """The manager, with all garbage freed; memory goes back to the system when the last user is gone."""
        with self._lock:
            self._sweep()
            if self.manager.limited and self._growth.look_again():
                self.manager.lift_limit()
            yield self.manager
            self._sweep()
        if self._garbage:  # queued between the sweep and the release of the lock
            self._try_sweep()

    def reclaim(self, sequences: list[SequenceBlocks]) -> None:
        """Takes the blocks of `sequences` back, now or as soon as the manager is free."""
        self._garbage.append(sequences)
        self._try_sweep()

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
        # The store may be busy, in this very thread if the collector ran in a step: whoever is at it comes back for this.
        if self._release_due and self._store_lock.acquire(blocking=False):
            try:
                self._release_due = False
                if self.manager.high_water == 0:
                    self.store.release(0)
                    self.manager.clear()
            finally:
                self._store_lock.release()

    def run(self, plan: Plan, batch: StepBatch) -> StepOutput:
        """One step over the store, one at a time: a store may move its memory as it grows."""
        with self._store_lock:
            made = plan.run(batch, self.store)
        if self._release_due:
            self._try_sweep()
        return made

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Bytes for blocks that were split off a shared one."""
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

    def drop_blocks(self, sequence: SequenceBlocks, first_block: int, count: int, first_position: int = 0) -> None:
        """Lets go of `count` full blocks of a sequence from `first_block` on. The tokens behind them move up, and so do their
        positions: their keys turn back by 32 * count. Keys and values stay what the whole text made of them otherwise.

        Args:
            first_position: RoPE position of the sequence's first token; the others count on from there.

        Raises: with nothing changed,
            CacheFullError: blocks behind the gap are shared, and there are too few for copies of them.
            ForgottenError: tokens would come into a window from which they are gone.
            UnsupportedRequestError: keys of this model cannot be moved.
        """
        rotation = self.rotation
        if rotation is None:
            raise UnsupportedRequestError(
                "this model's cached keys cannot be moved to other positions: run it without a window"
            )
        end = first_block + count
        tokens, position = sequence.tokens - end * BLOCK_TOKENS, first_position + end * BLOCK_TOKENS
        rotation.check(first_position + sequence.tokens)

        def move(copies: list[tuple[int, int]], blocks: list[int]) -> None:
            with self._store_lock:
                for source, target in copies:
                    self.store.copy_block(source, target)
                held = [block for block in blocks if block != HOLE]
                gone = (len(blocks) - len(held)) * BLOCK_TOKENS  # holes come first
                table = np.array(held, np.int32)
                self.store.rotate(rotation, table, tokens - gone, position + gone, -count * BLOCK_TOKENS)

        with self.locked():
            sequence.drop(first_block, count, move)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return (self.manager.num_blocks - self.manager.free_blocks) * self.store.block_bytes
