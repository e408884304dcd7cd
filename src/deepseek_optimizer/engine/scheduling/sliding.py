"""Dialogues without end in bounded memory: sequences whose cache slides. No torch.

A window grows with its dialogue, so that nothing goes that need not, up to what was asked for, within the model's trained
context and the cache. Before more tokens come than fit, blocks from its middle go and those behind move up
(`cache.cache_window` says which, the memory rotates their keys). Where other sequences need blocks, the largest window shrinks
before any sequence loses all of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...cache.block_manager import BLOCK_TOKENS
from ...cache.cache_window import CacheWindow, Drop
from ...cache.prefix_cache import PrefixCache
from ...errors import CacheFullError, ConfigError, RequestError
from ..running import Running
from .memory import Memory

FLOOR = 1024  # tokens: a window does not shrink below them for others' sake


class Sliding:
    """
    Args:
        window: tokens that a sequence may hold, within the trained context.
        sinks: at the beginning, that always stay.
        moved: told of each sequence whose tokens have moved, and by how many places.
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
        """Raises RequestError for spans that leave no room in a window, or lie outside the prompt."""
        pinned = tuple(pinned)
        self.policy.check(pinned)
        if any(end > prompt for _, end in pinned):
            raise RequestError("pinned", f"a span reaches behind the prompt's {prompt} tokens")

    def most(self, running: Running) -> int:
        """Tokens that may come into its cache at once."""
        return max(1, self.policy.room(running.pinned))

    def slide(self, running: Running, coming: int) -> bool:
        """Makes its window fit so many tokens more; False: there are too few blocks to do it."""
        return self._drop(running, self.policy, coming)

    def shrink(self, running: list[Running]) -> bool:
        """Lets a share of somebody's window go because others need the blocks: the largest window's. False: all are small."""
        for r in sorted(running, key=lambda r: -r.sequence.cached):
            if r.sequence.cached <= FLOOR:
                return False
            try:
                smaller = CacheWindow(r.sequence.cached, self.sinks)
            except ConfigError:  # it is little more than its sinks
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
                except CacheFullError:  # others took them meanwhile
                    return False
            self._renumber(running, drop)
        return True

    def _release(self, running: Running, first: int) -> None:
        """What it shares with the prefix cache alone, from block `first` on, becomes its own: nobody needs copies then."""
        if self._prefix is not None and running.registered > first:
            with self._memory.locked():
                self._prefix.forget(running.keys[first : running.registered])
        running.registered = min(running.registered, first)
        running.shareable = first if running.shareable is None else min(running.shareable, first)
        del running.keys[running.shareable :]

    def _renumber(self, running: Running, drop: Drop) -> None:
        end = drop.begin + drop.tokens
        del running.sequence.tokens[drop.begin : end]
        running.prompt -= max(0, min(running.prompt, end) - min(running.prompt, drop.begin))
        running.pinned = drop.renumbered(running.pinned)
        running.dropped += drop.tokens
        self._moved(running, drop.tokens)


def window_of(asked: int, context: int, blocks: int) -> int:
    """Tokens of a window: as asked for, as far as the model's trained context and the cache go."""
    return min(asked, context, blocks * BLOCK_TOKENS)
