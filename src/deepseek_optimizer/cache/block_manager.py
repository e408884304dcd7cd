"""Blocks of the KV cache: who owns which. No torch, no bytes.

A block holds the K and V of 32 tokens of all layers. It may belong to several sequences (after `fork`); before one of them
writes into it, that one gets a copy of its own, and whoever drives the backend's `KvStore` copies the bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import CacheFullError

BLOCK_TOKENS = 32  # the same on every backend, and DSO_BLOCK_TOKENS in dso.h


class BlockManager:
    """Hands out block ids below `num_blocks`, lowest first, so that high blocks stay untouched or can be given back."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks must not be negative, got {num_blocks}")
        self.num_blocks = num_blocks
        self._users: dict[int, int] = {}  # block -> how many sequences hold it
        self._freed: list[int] = []  # heap of ids below _next that are free
        self._next = 0  # ids from here on were never handed out, or were all given back

    @property
    def free_blocks(self) -> int:
        return self.num_blocks - len(self._users)

    @property
    def high_water(self) -> int:
        """One past the highest block in use: a store may release every block from here on."""
        return max(self._users, default=-1) + 1

    def users(self, block: int) -> int:
        """How many sequences hold a block; 0 for a free one."""
        return self._users.get(block, 0)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one user each, or CacheFullError and no change."""
        if count > self.free_blocks:
            raise CacheFullError(count, self.free_blocks)
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
    """The blocks of one sequence, in order, and how many tokens they hold."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.blocks: list[int] = []
        self.tokens = 0

    def fits(self, count: int) -> bool:
        """Whether so many more tokens lie in the last block, and nobody shares it: then counting them is all that is needed."""
        used = self.tokens % BLOCK_TOKENS
        return 0 < used <= BLOCK_TOKENS - count and self.manager.users(self.blocks[-1]) == 1

    def adopt(self, blocks: list[int]) -> None:
        """Begins with full blocks that hold what this sequence begins with; they count it among their users already."""
        if self.blocks:
            raise ValueError("only an empty sequence can begin with blocks of another")
        self.blocks, self.tokens = list(blocks), len(blocks) * BLOCK_TOKENS

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

    def crop(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens and frees blocks that hold none of them."""
        if not 0 <= tokens <= self.tokens:
            raise ValueError(f"cannot crop to {tokens} tokens: there are {self.tokens}")
        keep = -(-tokens // BLOCK_TOKENS)
        for block in self.blocks[keep:]:
            self.manager.release(block)
        del self.blocks[keep:]
        self.tokens = tokens

    def drop(self, first_block: int, count: int, move: Callable[[list[tuple[int, int]], list[int]], None]) -> None:
        """Lets go of `count` full blocks from the midst; the tokens behind them move up. Those move to other positions too, so
        blocks there that others hold as well become this sequence's own.

        Args:
            move: makes the bytes fit, before anything is let go: it gets (source, target) blocks to copy, and all blocks
                behind the gap as they will be. If it raises, nothing was changed here.

        Raises:
            CacheFullError: too few free blocks for the copies; nothing was changed.
        """
        if first_block < 0 or count < 0 or (first_block + count) * BLOCK_TOKENS > self.tokens:
            raise ValueError(f"blocks [{first_block}, {first_block + count}) are not full blocks of {self.tokens} tokens")
        if count == 0:
            return
        behind = self.blocks[first_block + count :]
        shared = [i for i, block in enumerate(behind) if self.manager.users(block) > 1]
        own = self.manager.allocate(len(shared))
        moved = list(behind)
        for i, block in zip(shared, own, strict=True):
            moved[i] = block
        try:
            move([(behind[i], moved[i]) for i in shared], moved)
        except BaseException:
            for block in own:
                self.manager.release(block)
            raise
        for block in (*self.blocks[first_block : first_block + count], *(behind[i] for i in shared)):
            self.manager.release(block)
        self.blocks[first_block:] = moved
        self.tokens -= count * BLOCK_TOKENS

    def fork(self) -> SequenceBlocks:
        """A sequence with the same content; its blocks are shared until one of the two writes."""
        twin = SequenceBlocks(self.manager)
        twin.blocks, twin.tokens = list(self.blocks), self.tokens
        for block in twin.blocks:
            self.manager.retain(block)
        return twin

    def free(self) -> None:
        """Gives every block back; the sequence is empty again."""
        self.crop(0)

    def table(self) -> npt.NDArray[np.int32]:
        """Block ids, int32 [blocks]."""
        return np.asarray(self.blocks, dtype=np.int32)
