"""Sliding cache windows: dialogues of unlimited length in bounded memory. Does not import torch.

A window grows with its dialogue up to the configured size, within the model's trained context and the cache, so that no tokens
are dropped needlessly. When new tokens do not fit, blocks from its middle are dropped and later ones move up
(`cache.cache_window` chooses the blocks; the memory rotates the moved keys). If other sequences need blocks, the largest window
shrinks before any sequence is preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...cache.cache_window import CacheWindow, Drop
from ...cache.prefix_cache import PrefixCache
from ...errors import CacheFullError, ConfigError, RequestError
from ..running import Running
from .memory import Memory

FLOOR = 1024  # tokens; a window does not shrink below this for other sequences


class Sliding:
    """Slides and shrinks the windows of sequences.

    Args:
        memory: the cache memory.
        prefix: the prefix cache; None: there is none.
        window: maximum number of tokens of a sequence in the cache, within the trained context.
        sinks: number of tokens at the beginning that always stay.
        moved: called with each request whose tokens have moved, and the number of tokens dropped.
    """

    def __init__(
        self, memory: Memory, prefix: PrefixCache | None, window: int, sinks: int, moved: Callable[[Running, int], None]
    ) -> None:
        self._memory, self._prefix, self._moved = memory, prefix, moved
        self.sinks, self.policy = sinks, CacheWindow(window, sinks)

    @property
    def window(self) -> int:
        return self.policy.tokens

    def check(self, pinned: Iterable[tuple[int, int]], prompt: int) -> None:
        """Checks a request's pinned ranges.

        Args:
            pinned: (begin, end) ranges of prompt tokens.
            prompt: number of prompt tokens.

        Raises:
            RequestError: the ranges leave no room in a window, or lie outside the prompt.
        """
        pinned = tuple(pinned)
        self.policy.check(pinned)
        if any(end > prompt for _, end in pinned):
            raise RequestError("pinned", f"a range ends after the prompt's {prompt} tokens")

    def max_new_tokens(self, running: Running) -> int:
        """Returns the maximum number of tokens that can be added to the request's cache at once."""
        return max(1, self.policy.room(running.pinned))

    def slide(self, running: Running, coming: int) -> bool:
        """Makes room for `coming` more tokens in the request's window; returns False if too few blocks are free for that."""
        return self._drop(running, self.policy, coming)

    def shrink(self, running: list[Running]) -> bool:
        """Shrinks the largest window of these requests, to free blocks for others; returns False if none can shrink."""
        for r in sorted(running, key=lambda r: -r.sequence.cached):
            if r.sequence.cached <= FLOOR:
                return False
            try:
                smaller = CacheWindow(r.sequence.cached, self.sinks)
            except ConfigError:  # little more than its sinks
                continue
            if smaller.room(r.pinned) > 0 and self._drop(r, smaller, 1):
                return True
        return False

    def _drop(self, running: Running, policy: CacheWindow, coming: int) -> bool:
        for drop in policy.drops(running.sequence.cached, running.pinned, coming):
            self._release(running, drop.first_block)
            try:
                self._memory.drop_blocks(running.sequence.blocks, drop.first_block, drop.count)
            except CacheFullError as error:
                needed = error.needed - error.free
                with self._memory.locked():
                    freed = self._prefix.evict(needed) if self._prefix else 0
                if freed < needed:
                    return False
                try:
                    self._memory.drop_blocks(running.sequence.blocks, drop.first_block, drop.count)
                except CacheFullError:  # others have taken the blocks meanwhile
                    return False
            self._renumber(running, drop)
        return True

    def _release(self, running: Running, first: int) -> None:
        """Removes the request's blocks from `first` on from the prefix cache, so that they need not be copied to be changed."""
        if self._prefix is not None and running.registered > first:
            with self._memory.locked():
                self._prefix.forget(running.keys[first : running.registered])
        running.registered = min(running.registered, first)
        running.unmoved = first if running.unmoved is None else min(running.unmoved, first)
        del running.keys[running.unmoved :]

    def _renumber(self, running: Running, drop: Drop) -> None:
        end = drop.begin + drop.tokens
        del running.sequence.tokens[drop.begin : end]
        running.prompt -= max(0, min(running.prompt, end) - min(running.prompt, drop.begin))
        running.pinned = drop.renumbered(running.pinned)
        running.dropped += drop.tokens
        self._moved(running, drop.tokens)
