"""Blocks of the KV cache: who owns which. No torch, no bytes.

A block holds the K and V of 32 tokens of all layers. It may belong to several sequences (after `fork`); before one of them
writes into it, that one gets a copy of its own, and whoever drives the backend's `KvStore` copies the bytes. Where no later
token sees a block (`Forgetting`), a sequence can let go of it and goes on with a hole in its place.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import CacheFullError, ForgottenError
from .forgetting import BLOCK_TOKENS as BLOCK_TOKENS
from .forgetting import Forgetting

HOLE = -1  # in place of a block that was forgotten


class Growth(Protocol):
    """Asked before blocks are handed out that have no memory yet.

    Attributes:
        shortage: why it gave less than was asked for; None: it gave all, last time.
    """

    shortage: str | None

    def grow(self, wanted: int, backed: int) -> int:
        """How many blocks, from the first on, may have memory now, of `wanted` that should; `backed` have it already."""


class BlockManager:
    """Hands out block ids below `num_blocks`, lowest first, so that high blocks stay untouched or can be given back.

    Args:
        forgetting: what its sequences may forget; None: nothing.
        growth: finds out whether there is memory for more; None: there always is.
    """

    def __init__(self, num_blocks: int, forgetting: Forgetting | None = None, growth: Growth | None = None) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks must not be negative, got {num_blocks}")
        self.num_blocks, self.forgetting, self._growth = num_blocks, forgetting, growth
        self._users: dict[int, int] = {}  # block -> how many sequences hold it
        self.clear()

    def clear(self) -> None:
        """Begins anew, once nobody holds a block and the store has given its memory back."""
        if self._users:
            raise ValueError(f"{len(self._users)} blocks are in use")
        self._freed: list[int] = []  # heap of ids below _next that are free
        self._next = 0  # ids from here on were never handed out
        self._backed = self.num_blocks if self._growth is None else 0  # blocks that may have memory
        self._limit = self.num_blocks  # fewer, once there was no memory for more

    @property
    def free_blocks(self) -> int:
        """Blocks that can be handed out, as far as is known: memory for them is looked for when they are."""
        return self._limit - len(self._users)

    @property
    def shortage(self) -> str | None:
        """Why there is no memory for more blocks; None: there is, or nobody asked."""
        return None if self._growth is None else self._growth.shortage

    @property
    def limited(self) -> bool:
        """Whether no memory for more blocks is looked for, since there was none."""
        return self._limit < self.num_blocks

    def lift_limit(self) -> None:
        """Memory is looked for again when more blocks are needed."""
        self._limit = self.num_blocks

    @property
    def high_water(self) -> int:
        """One past the highest block in use: a store may release every block from here on."""
        return max(self._users, default=-1) + 1

    def users(self, block: int) -> int:
        """How many sequences hold a block; 0 for a free one."""
        return self._users.get(block, 0)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one user each, or CacheFullError and no change."""
        wanted = self._next + count - len(self._freed)
        if self._growth is not None and self._backed < wanted <= self._limit:
            self._backed = self._growth.grow(wanted, self._backed)
            if self._backed < wanted:
                self._limit = self._backed
        if count > self.free_blocks:
            raise CacheFullError(count, self.free_blocks, self.shortage if self.limited else None)
        blocks = [self._take() for _ in range(count)]
        self._users.update(dict.fromkeys(blocks, 1))
        return blocks

    def _take(self) -> int:
        if self._freed:
            return heapq.heappop(self._freed)
        self._next += 1
        return self._next - 1

    def retain(self, block: int) -> None:
        """One more user of a block in use."""
        self._users[block] += 1

    def release(self, block: int) -> None:
        """One user less; the last one frees the block."""
        self._users[block] -= 1
        if self._users[block] == 0:
            del self._users[block]
            heapq.heappush(self._freed, block)


class SequenceBlocks:
    """The blocks of one sequence, in order, and how many tokens they hold.

    Attributes:
        blocks: ids; HOLE in place of those that were forgotten.
        holes: which of them are holes: they lie side by side.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.blocks: list[int] = []
        self.tokens = 0
        self.holes = range(0)

    @property
    def held(self) -> int:
        """Blocks that are there."""
        return len(self.blocks) - len(self.holes)

    def fits(self, count: int) -> bool:
        """Whether so many more tokens lie in the last block, and nobody shares it: then counting them is all that is needed."""
        used = self.tokens % BLOCK_TOKENS
        return 0 < used <= BLOCK_TOKENS - count and self.manager.users(self.blocks[-1]) == 1

    def adopt(self, blocks: list[int]) -> None:
        """Begins with full blocks that hold what this sequence begins with; they count it among their users already. Those that
        it need not see may be holes."""
        if self.blocks:
            raise ValueError("only an empty sequence can begin with blocks of another")
        self.blocks, self.tokens = list(blocks), len(blocks) * BLOCK_TOKENS
        holes = [n for n, block in enumerate(blocks) if block == HOLE]
        self.holes = range(holes[0], holes[-1] + 1) if holes else range(0)

    def append(self, count: int) -> list[tuple[int, int]]:
        """Makes room for `count` more tokens.

        Returns: (source, target) blocks whose bytes must be copied before the tokens are written: the last block, where it is
        half full and shared.

        Raises:
            CacheFullError: too few free blocks; nothing was changed.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        new = -(-(self.tokens + count) // BLOCK_TOKENS) - len(self.blocks)
        writes_into_last = count > 0 and self.tokens % BLOCK_TOKENS != 0
        split = writes_into_last and self.manager.users(self.blocks[-1]) > 1
        taken = self.manager.allocate(new + split)
        copies = []
        if split:
            source, target = self.blocks[-1], taken.pop(0)
            self.manager.release(source)
            self.blocks[-1] = target
            copies.append((source, target))
        self.blocks += taken
        self.tokens += count
        return copies

    @property
    def forgettable(self) -> range:
        """Places of the blocks that no later token sees, and that are there yet."""
        forgetting = self.manager.forgetting
        if forgetting is None:
            return range(0)
        return range(self.holes.stop if self.holes else forgetting.sink_blocks, forgetting.first_kept(self.tokens))

    def forget(self) -> range:
        """Lets go of what is forgettable, and returns its places."""
        gone = self.forgettable
        if gone:
            self._release(self.blocks[gone.start : gone.stop])
            self.blocks[gone.start : gone.stop] = [HOLE] * len(gone)
            self.holes = range(self.holes.start if self.holes else gone.start, gone.stop)
        return gone

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            if block != HOLE:
                self.manager.release(block)

    def crop(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens and frees blocks that hold none of them.

        Raises:
            ForgottenError: the next token would see what was forgotten; nothing was changed.
        """
        holes, keep = self.check_crop(tokens), -(-tokens // BLOCK_TOKENS)
        self._release(self.blocks[keep:])
        del self.blocks[keep:]
        self.tokens, self.holes = tokens, holes

    def check_crop(self, tokens: int) -> range:
        """Which blocks would be holes after a crop; raises what it would raise."""
        if not 0 <= tokens <= self.tokens:
            raise ValueError(f"cannot crop to {tokens} tokens: there are {self.tokens}")
        holes = self.holes if tokens > self.holes.start * BLOCK_TOKENS else range(0)
        self._check(tokens, holes)
        return holes

    def _check(self, tokens: int, holes: range) -> None:
        """Raises ForgottenError where the next of so many tokens would see a hole."""
        forgetting = self.manager.forgetting
        if holes and forgetting is not None and forgetting.first_seen(tokens) < holes.stop:
            raise ForgottenError(tokens, self.tokens, forgetting.window)

    def drop(self, first_block: int, count: int, move: Callable[[list[tuple[int, int]], list[int]], None]) -> None:
        """Lets go of `count` full blocks from the midst; the tokens behind them move up. Those move to other positions too, so
        blocks there that others hold as well become this sequence's own.

        Args:
            move: makes the bytes fit, before anything is let go: it gets (source, target) blocks to copy, and all blocks
                behind the gap as they will be, holes first. If it raises, nothing was changed here.

        Raises:
            CacheFullError: too few free blocks for the copies; nothing was changed.
            ForgottenError: the next token would see what was forgotten; nothing was changed.
        """
        end = first_block + count
        if first_block < 0 or count < 0 or end * BLOCK_TOKENS > self.tokens:
            raise ValueError(f"blocks [{first_block}, {end}) are not full blocks of {self.tokens} tokens")
        if count == 0:
            return
        moved_up = (place if place <= first_block else max(first_block, place - count) for place in _ends(self.holes))
        holes, tokens = range(*moved_up), self.tokens - count * BLOCK_TOKENS
        self._check(tokens, holes)
        behind = self.blocks[end:]
        shared = [i for i, block in enumerate(behind) if self.manager.users(block) > 1]
        own = self.manager.allocate(len(shared))
        moved = list(behind)
        for i, block in zip(shared, own, strict=True):
            moved[i] = block
        try:
            move([(behind[i], moved[i]) for i in shared], moved)
        except BaseException:
            self._release(own)
            raise
        self._release([*self.blocks[first_block:end], *(behind[i] for i in shared)])
        self.blocks[first_block:] = moved
        self.tokens, self.holes = tokens, holes

    def fork(self) -> SequenceBlocks:
        """A sequence with the same content; its blocks are shared until one of the two writes."""
        twin = SequenceBlocks(self.manager)
        twin.blocks, twin.tokens, twin.holes = list(self.blocks), self.tokens, self.holes
        for block in twin.blocks:
            if block != HOLE:
                self.manager.retain(block)
        return twin

    def free(self) -> None:
        """Gives every block back; the sequence is empty again."""
        self.crop(0)

    def table(self) -> npt.NDArray[np.int32]:
        """Block ids, int32 [blocks]."""
        return np.asarray(self.blocks, dtype=np.int32)


def _ends(places: range) -> tuple[int, int]:
    return places.start, places.stop
