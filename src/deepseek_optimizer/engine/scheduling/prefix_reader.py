"""Reads blocks from the prefix cache's store into the prefix cache. No torch.

Threads read and check the contents; the engine's thread writes them into blocks, between steps and a limited amount at a time,
so that other requests continue.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ...cache.block_manager import BlockManager
from ...cache.prefix_cache import Key, PrefixCache
from ...cache.prefix_parts import STATES, Part, longest, required
from ...errors import CacheFullError
from .memory import Memory
from .store import Store

_log = logging.getLogger(__name__)
_THREADS = 4
_AHEAD = 32  # parts that are read but not written into blocks yet, at most
_PER_STEP = 64 << 20  # bytes that are written into blocks between two steps, approximately


class _Job:
    """The parts of a prefix that are being read, and the blocks and slots reserved for them."""

    def __init__(self, parts: list[Part], places: list[int], last: Key) -> None:
        self.parts, self.places = parts, places
        self.keys = {key for key, _ in parts} | {last}  # with the prefix's last full block, which may be in memory
        self.next = 0  # the first part that no thread reads yet
        self.reading: deque[Future[bytes | None]] = deque()
        self.early: dict[int, Future[bytes | None]] = {}  # of parts that are read before their turn
        self.present: list[bool] = []  # of the parts before those in `reading`: whether they were read

    @property
    def ended(self) -> bool:
        return len(self.present) == len(self.parts)


class PrefixReader:
    """
    Args:
        store, memory, prefix: as for `PrefixStore`.

    Attributes:
        parts, bytes: number of parts that were read since the start, and their size.
    """

    def __init__(self, store: Store, memory: Memory, prefix: PrefixCache) -> None:
        self._store, self._memory, self._prefix = store, memory, prefix
        self.parts = self.bytes = 0
        self._jobs: list[_Job] = []
        self._pool: ThreadPoolExecutor | None = None

    def reading(self, wanted: list[Key]) -> bool:
        """Whether parts of a prefix are being read.

        Args:
            wanted: the keys of its blocks.
        """
        return any(not job.keys.isdisjoint(wanted) for job in self._jobs)

    def begin(self, wanted: list[Key], reserved: int, partial: Callable[[int], list[Key]] = lambda blocks: []) -> bool:
        """Starts to read what the prefix cache lacks of the longest prefix that memory and store have together.

        Args:
            wanted: keys of a text's blocks.
            reserved: number of blocks that must remain for others.
            partial: keys of the partly filled blocks from which the text could continue after a number of full blocks, the
                fullest first.

        Returns: whether anything is to be read; not if there is no room for it.
        """
        prefix = self._prefix
        with self._memory.locked() as manager:
            states = manager.slots is not None
            count = longest(wanted, prefix.groups, states, self._has)
            rest = self._partial(partial(count))  # with its states, those after the full blocks are not needed
            needed = [*required(wanted[:count], prefix.groups, states and not rest), *rest]
            parts = [part for part in needed if not prefix.has(*part)]
            if not parts or (places := self._reserve(manager, wanted[:count], parts, reserved)) is None:
                return False
        job = _Job(parts, places, wanted[count - 1])
        self._jobs.append(job)
        self._submit(job)
        return True

    def _has(self, key: Key, group: int) -> bool:
        return self._prefix.has(key, group) or self._store.has(key, group)

    def _partial(self, candidates: list[Key]) -> list[Part]:
        """The parts of the first of some partly filled blocks of which all are in memory or in the store."""
        for parts in map(self._prefix.parts_of, candidates):
            if all(self._has(*part) for part in parts):
                return parts
        return []

    def _reserve(self, manager: BlockManager, known: list[Key], parts: list[Part], reserved: int) -> list[int] | None:
        """A block or slot for each part; None if there are too few. The lock must be held."""
        blocks = sum(group != STATES for _, group in parts)
        missing = blocks + reserved - manager.free_blocks
        if missing > 0 and not self._prefix.can_evict(missing):
            return None
        self._prefix.touch(known)
        self._prefix.evict(max(0, blocks - manager.free_blocks))
        taken: list[int] = []
        try:
            taken = manager.allocate(blocks)
            slots = manager.slots.allocate(len(parts) - blocks) if manager.slots is not None else []
        except CacheFullError:
            for block in taken:
                manager.release(block)
            return None
        free = iter(taken), iter(slots)
        return [next(free[group == STATES]) for _, group in parts]

    def _submit(self, job: _Job) -> None:
        if self._pool is None:
            threads = min(_THREADS, os.cpu_count() or 1)
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dso-prefix-reader")
        if not job.next:  # states are much larger than blocks: while they are read, blocks are read and written
            states = [index for index, (_, group) in enumerate(job.parts) if group == STATES]
            job.early = {index: self._pool.submit(self._store.read, *job.parts[index]) for index in states}
        while job.next < len(job.parts) and len(job.reading) < _AHEAD:
            part = job.early.pop(job.next, None) or self._pool.submit(self._store.read, *job.parts[job.next])
            job.reading.append(part)
            job.next += 1

    def collect(self) -> None:
        """Writes contents that were read into their blocks; blocks of prefixes that have been read go to the prefix cache."""
        written = 0
        for job in list(self._jobs):
            while job.reading and job.reading[0].done() and written < _PER_STEP:
                written += self._receive(job)
                self._submit(job)
            if job.ended:
                self._jobs.remove(job)
                with self._memory.locked() as manager:
                    self._finish(manager, job)

    def _receive(self, job: _Job) -> int:
        """Writes the next part into its block; returns its number of bytes."""
        index = len(job.present)
        try:
            content = job.reading.popleft().result()
            if content is not None:
                write = self._memory.write_state if job.parts[index][1] == STATES else self._memory.write_block
                write(job.places[index], content)
        except Exception:  # such as no memory; the text is processed instead
            _log.exception("a block of the prefix cache could not be read")
            content = None
        job.present.append(content is not None)
        if content is None:
            return 0
        self.parts += 1
        self.bytes += len(content)
        return len(content)

    def abandon(self, manager: BlockManager) -> bool:
        """Stops reading one of the prefixes, since running requests need its blocks; what was read goes to the prefix cache.
        Returns whether there was one. The lock must be held."""
        if not self._jobs:
            return False
        self._finish(manager, self._jobs.pop())
        return True

    def _finish(self, manager: BlockManager, job: _Job) -> None:
        """Puts the parts into the prefix cache, if they were read, and releases their places otherwise. The lock must be
        held."""
        for future in (*job.reading, *job.early.values()):
            future.cancel()
        for index, ((key, group), place) in enumerate(zip(job.parts, job.places, strict=True)):
            present = index < len(job.present) and job.present[index]
            if group == STATES and manager.slots is not None:
                if present:
                    self._prefix.put_state(key, place)
                manager.slots.release(place)
            else:
                if present:
                    self._prefix.put(key, place, group)
                manager.release(place)

    def wait(self, seconds: float) -> bool:
        """Waits until something was read, for at most `seconds`; returns False at once if nothing is being read."""
        first = [job.reading[0] for job in self._jobs if job.reading]
        if first:
            wait(first, seconds, FIRST_COMPLETED)
        return bool(self._jobs)

    def stop(self) -> None:
        """Stops reading all prefixes."""
        with self._memory.locked() as manager:
            while self.abandon(manager):
                pass

    def close(self) -> None:
        """Stops reading and ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self.stop()
