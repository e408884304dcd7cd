"""Writes blocks of the prefix cache to its store, on a thread of its own. No torch."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from ...cache.prefix_cache import PrefixCache
from ...cache.prefix_parts import STATES, Part
from .memory import Memory
from .store import Store

_log = logging.getLogger(__name__)
_MAX_QUEUED = 1 << 17  # parts; further ones are not written
_TRIES = 4  # to copy a part
_PAUSE = 60.0  # seconds without writing after an error, such as a full disk
_PLACE_NS = 1_000  # a later block of a text counts as older by this, since it is useless without the earlier ones


class PrefixWriter:
    """Writes the parts of prefixes that requests have left in the prefix cache, as far as they are not stored yet. The queue
    holds their names only; the thread copies one at a time. A part that is evicted before its turn is not written.

    Args:
        store, memory, prefix: as for `PrefixStore`.

    Attributes:
        dropped: number of parts that were not written because the queue was full or after an error.
    """

    def __init__(self, store: Store, memory: Memory, prefix: PrefixCache) -> None:
        self._store, self._memory, self._prefix = store, memory, prefix
        self._queue: deque[list[Part]] = deque()
        self._queued = 0
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._end_by: float | None = None  # closing: the time after which nothing is written
        self._paused_until = 0.0
        self.dropped = 0

    def save(self, parts: list[Part]) -> None:
        """Queues the parts of a prefix, which are in the prefix cache, the most important ones first."""
        with self._wake:
            if self._end_by is not None:
                return
            if self._queued + len(parts) > _MAX_QUEUED:
                self.dropped += len(parts)
                return
            self._queue.append(parts)
            self._queued += len(parts)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dso-prefix-writer", daemon=True)
                self._thread.start()
            self._wake.notify()

    def flush(self, seconds: float) -> None:
        """Waits until what is queued has been written, for at most `seconds`."""
        with self._wake:
            self._wake.wait_for(lambda: self._queued == 0, seconds)

    def close(self, seconds: float) -> bool:
        """Writes what is queued, for at most `seconds`, and ends the thread. Returns whether everything was written."""
        with self._wake:
            self._end_by = time.monotonic() + seconds
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(seconds + 1.0)
        return self._queued == 0

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and self._end_by is None:
                    self._wake.wait()
                if not self._queue:
                    return
                parts = self._queue.popleft()
            now = time.time_ns()
            for place, part in enumerate(parts):
                if self._end_by is not None and time.monotonic() > self._end_by:
                    return
                self._write(part, now - place * _PLACE_NS)
            with self._wake:
                self._queued -= len(parts)
                self._wake.notify_all()

    def _write(self, part: Part, used_ns: int) -> None:
        key, group = part
        if time.monotonic() < self._paused_until:
            self.dropped += 1
            return
        try:
            if not self._store.touch(key, group, used_ns) and (content := self._copy(part)) is not None:
                self._store.write(key, group, content, used_ns)
        except Exception as error:  # the cache in memory is not affected
            self.dropped += 1
            self._paused_until = time.monotonic() + _PAUSE
            _log.warning("the prefix cache cannot be written for the next %g s: %s", _PAUSE, error)

    def _copy(self, part: Part) -> bytes | None:
        """The content of a part; None: it was evicted. Copying does not keep it from being evicted: a copy is valid if nothing
        was evicted meanwhile."""
        for _ in range(_TRIES):
            with self._memory.locked():
                place, removals = self._prefix.place(part), self._prefix.removals
            if place is None:
                return None
            content = self._memory.read_state(place) if part[1] == STATES else self._memory.read_block(place)
            with self._memory.locked():
                if removals == self._prefix.removals:
                    return content
        return None
