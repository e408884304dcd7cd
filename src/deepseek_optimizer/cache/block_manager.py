"""Ownership of the KV cache's blocks. No torch, no bytes.

A block holds the K and V of 32 tokens in all layers of a group. Layers that attend to every token and layers with a window are
in different groups (`graph.cache_groups`); every block can serve every group, and a sequence has a table of blocks per group.
Several sequences may share a block (after `fork`); it is copied on write, and the caller copies the bytes in the backend's
`KvStore`. A block that no later token attends to (`Forgetting`) can be released early; a hole then takes its place.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import CacheFullError, DroppedTokensError
from .block_table import HOLE as HOLE
from .block_table import BlockTable
from .forgetting import BLOCK_TOKENS as BLOCK_TOKENS
from .forgetting import Forgetting, Groups, kept_whole, widest
from .sequence_states import SequenceStates


class Growth(Protocol):
    """Called before blocks are allocated that have no memory behind them yet.

    Attributes:
        shortage: why the last call granted less than requested; None: it granted everything.
    """

    shortage: str | None

    def grow(self, wanted: int, backed: int) -> int:
        """Returns how many blocks, counted from the first, may be backed by memory now.

        Args:
            wanted: blocks that should be backed.
            backed: blocks that are backed already.
        """


class BlockManager:
    """Allocates block ids below `num_blocks`, lowest first, so that high blocks stay untouched or can be returned to the
    system.

    Args:
        num_blocks: blocks in all.
        groups: for each group of layers, which of its blocks sequences may release early; None: none.
        growth: checks whether there is memory for more blocks; None: there always is.
        slots: allocates the slots for recurrent states, as another manager does blocks; None: the model has no such states.
        unit: what it allocates, for errors.

    Attributes:
        reclaim: called with a number of blocks if too few are free; may release some. None: nothing can be released.
    """

    def __init__(
        self,
        num_blocks: int,
        groups: Groups = (None,),
        growth: Growth | None = None,
        slots: BlockManager | None = None,
        unit: str = "block",
    ) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks must not be negative, got {num_blocks}")
        self.slots, self.unit = slots, unit
        self.reclaim: Callable[[int], object] | None = None
        self.num_blocks, self.groups, self._growth = num_blocks, groups, growth
        self._users: dict[int, int] = {}  # block -> number of sequences that hold it
        self.clear()

    def clear(self) -> None:
        """Resets the manager, once no block is in use and the store has released its memory."""
        if self._users:
            raise ValueError(f"{len(self._users)} blocks are in use")
        self._freed: list[int] = []  # heap of free ids below _next
        self._next = 0  # ids from here on were never allocated
        self._backed = self.num_blocks if self._growth is None else 0  # blocks that may be backed by memory
        self._limit = self.num_blocks  # lowered when there was no memory for more

    @property
    def forgetting(self) -> Forgetting | None:
        """Which tokens no layer attends to; None: a layer may attend to every token."""
        return widest(self.groups)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated, as far as is known: whether there is memory for them is checked on allocation."""
        return self._limit - len(self._users)

    @property
    def shortage(self) -> str | None:
        """Why there is no memory for more blocks; None: there is, or it was never checked."""
        return None if self._growth is None else self._growth.shortage

    @property
    def limited(self) -> bool:
        """Whether the number of blocks is limited because there was no memory for more."""
        return self._limit < self.num_blocks

    def lift_limit(self) -> None:
        """Checks for memory again when more blocks are needed."""
        self._limit = self.num_blocks

    @property
    def high_water(self) -> int:
        """One past the highest block in use: a store may release the memory of all blocks from here on."""
        return max(self._users, default=-1) + 1

    def users(self, block: int) -> int:
        """Number of sequences that hold a block; 0 for a free one."""
        return self._users.get(block, 0)

    def allocate(self, count: int) -> list[int]:
        """Allocates `count` blocks with one user each.

        Raises:
            CacheFullError: too few free blocks; nothing was changed.
        """
        wanted = self._next + count - len(self._freed)
        if self._growth is not None and self._backed < wanted <= self._limit:
            self._backed = self._growth.grow(wanted, self._backed)
            if self._backed < wanted:
                self._limit = self._backed
        if count > self.free_blocks and self.reclaim is not None:
            self.reclaim(count - self.free_blocks)
        if count > self.free_blocks:
            raise CacheFullError(count, self.free_blocks, self.shortage if self.limited else None, self.unit)
        blocks = [self._take() for _ in range(count)]
        self._users.update(dict.fromkeys(blocks, 1))
        return blocks

    def _take(self) -> int:
        if self._freed:
            return heapq.heappop(self._freed)
        self._next += 1
        return self._next - 1

    def retain(self, block: int) -> None:
        """Adds a user to a block in use."""
        self._users[block] += 1

    def release(self, block: int) -> None:
        """Removes a user; the last one frees the block."""
        self._users[block] -= 1
        if self._users[block] == 0:
            del self._users[block]
            heapq.heappush(self._freed, block)


class SequenceBlocks:
    """The blocks of one sequence, and the number of tokens they hold.

    Attributes:
        tables: its blocks in each group of layers. All tables have the same length.
        tokens: tokens of the sequence, those in holes included.
        states: its recurrent states; None: the model has none.

    Args:
        manager: allocates the blocks.
        interval: see `SequenceStates`.
        whole: release no blocks of layers early (`forgetting.kept_whole`).
    """

    def __init__(self, manager: BlockManager, interval: int = 0, whole: bool = False) -> None:
        self.manager = manager
        self.states = None if manager.slots is None else SequenceStates(manager.slots, interval)
        self.tables = [BlockTable(forgetting) for forgetting in (kept_whole(manager.groups) if whole else manager.groups)]
        self.tokens = 0

    @property
    def blocks(self) -> list[int]:
        """Block ids of the first group, HOLE for those released early."""
        return self.tables[0].blocks

    @property
    def holes(self) -> range:
        """Indices of the first group's holes, which are contiguous."""
        return self.tables[0].holes

    @property
    def held(self) -> int:
        """Blocks of all groups that are not holes."""
        return sum(table.held for table in self.tables)

    @property
    def groups(self) -> Groups:
        """For each group, which of its blocks this sequence may release early."""
        return tuple(table.forgetting for table in self.tables)

    def fits(self, count: int) -> bool:
        """Whether `count` more tokens fit into the last block and it is not shared: then `tokens` is all that has to change.
        Never with recurrent states."""
        used = self.tokens % BLOCK_TOKENS
        if self.states is not None or not 0 < used <= BLOCK_TOKENS - count:
            return False
        for table in self.tables:
            if self.manager.users(table.blocks[-1]) != 1:
                return False
        return True

    @property
    def room(self) -> int:
        """Number of tokens that fit into the last block without any other change; see `fits`."""
        rest = -self.tokens % BLOCK_TOKENS
        return rest if rest and self.fits(rest) else 0

    def adopt(self, tables: list[list[int]], slot: int | None = None) -> None:
        """Starts an empty sequence with full blocks of its first tokens, and the slot of its recurrent states after them, if
        it has any; the caller has counted it among their users. Blocks that it never attends to may be holes.

        Args:
            tables: the blocks of each group, all of the same length.
            slot: the slot; None for a sequence with states: the caller adds a partly filled block next, with its states.
        """
        if self.blocks:
            raise ValueError("only an empty sequence can adopt blocks")
        tokens = len(tables[0]) * BLOCK_TOKENS
        if self.states is not None and slot is not None:
            self.states.adopt(tokens, slot)
        for table, blocks in zip(self.tables, tables, strict=True):
            table.adopt(blocks)
        self.tokens = tokens

    def adopt_partial(self, blocks: list[int], count: int, slot: int | None = None) -> None:
        """Adds a block with the next `count` tokens, fewer than fill it, to a sequence of full blocks. The caller has counted
        the sequence among the users of the blocks and of the slot.

        Args:
            blocks: the block of each group.
            count: number of tokens.
            slot: the slot of the recurrent states after them, if the model has any.
        """
        if self.tokens % BLOCK_TOKENS or not 0 < count < BLOCK_TOKENS:
            raise ValueError(f"{count} tokens after {self.tokens} are not part of one block")
        if self.states is not None:
            self.states.adopt(self.tokens + count, slot)
        for table, block in zip(self.tables, blocks, strict=True):
            table.blocks.append(block)
        self.tokens += count

    def append(self, count: int, undo: int = 0) -> list[tuple[int, int]]:
        """Makes room for `count` more tokens.

        Args:
            count: number of tokens.
            undo: number of the last of them that may be cropped afterwards, also with recurrent states (see `SequenceStates`).

        Returns: (source, target) pairs of blocks whose bytes must be copied before the tokens are written: the last block of
            each group, if it is partly filled and shared.

        Raises:
            CacheFullError: too few free blocks; nothing was changed.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        new = -(-(self.tokens + count) // BLOCK_TOKENS) - len(self.blocks)
        writes_into_last = count > 0 and self.tokens % BLOCK_TOKENS != 0
        split = [table for table in self.tables if writes_into_last and self.manager.users(table.blocks[-1]) > 1]
        taken = self.manager.allocate(new * len(self.tables) + len(split))
        if self.states is not None and count:
            try:
                self.states.append(self.tokens, count, undo)
            except BaseException:
                self._release(taken)
                raise
        copies = []
        for table in split:
            source, target = table.blocks[-1], taken.pop(0)
            self.manager.release(source)
            table.blocks[-1] = target
            copies.append((source, target))
        for n, table in enumerate(self.tables):
            table.blocks += taken[n * new : (n + 1) * new]
        self.tokens += count
        return copies

    @property
    def forgettable(self) -> bool:
        """Whether there are blocks to `forget`."""
        for table in self.tables:
            if table.forgetting is not None and table.forgettable(self.tokens):
                return True
        return False

    def forget(self) -> list[range]:
        """Releases the blocks that no later token attends to; returns their indices in each group."""
        gone = [table.forgettable(self.tokens) for table in self.tables]
        for table, places in zip(self.tables, gone, strict=True):
            self._release(table.forget(places))
        return gone

    def nearest(self, tokens: int) -> int:
        """The largest number of tokens, at most `tokens`, that the sequence can be cropped to, as far as its recurrent states
        and the blocks released early are concerned."""
        while tokens != self.tokens:
            possible = tokens if self.states is None else self.states.latest(tokens)
            possible = min(table.nearest(possible) for table in self.tables)
            if possible == tokens:
                break
            tokens = possible
        return tokens

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            if block != HOLE:
                self.manager.release(block)

    def crop(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens and frees blocks that hold none of them.

        Raises:
            DroppedTokensError: the next token would attend to a released block; nothing was changed.
            StateMissingError: the recurrent states after `tokens` tokens are not stored; nothing was changed.
        """
        self.check_crop(tokens)
        keep = -(-tokens // BLOCK_TOKENS)
        if self.states is not None:
            self.states.crop(tokens)
        for table in self.tables:
            self._release(table.blocks[keep:])
            table.holes = table.holes_within(tokens)
            del table.blocks[keep:]
        self.tokens = tokens

    def check_crop(self, tokens: int) -> None:
        """Raises as `crop(tokens)` does."""
        if not 0 <= tokens <= self.tokens:
            raise ValueError(f"cannot crop to {tokens} tokens: there are {self.tokens}")
        for table in self.tables:
            self._check(table, tokens, table.holes_within(tokens))
        if self.states is not None and tokens < self.tokens:
            self.states.check_crop(tokens)

    def _check(self, table: BlockTable, tokens: int, holes: range) -> None:
        """Raises DroppedTokensError if the token after the first `tokens` would attend to one of these holes of the table."""
        if table.forgetting is not None and table.lacks(tokens, holes):
            raise DroppedTokensError(tokens, self.tokens, table.forgetting.window, self.nearest(tokens))

    def drop(self, first_block: int, count: int, move: Callable[[list[tuple[int, int]], list[list[int]]], None]) -> None:
        """Releases `count` full blocks of each group from the middle; later tokens move up. Their positions change, so later
        blocks that are shared are copied first.

        Args:
            move: adapts the bytes before anything is released. It receives (source, target) pairs of blocks to copy, and for
                each group all blocks after the gap as they will be, holes first. If it raises, nothing was changed here.

        Raises:
            CacheFullError: too few free blocks for the copies; nothing was changed.
            DroppedTokensError: the next token would attend to a released block; nothing was changed.
        """
        end = first_block + count
        if first_block < 0 or count < 0 or end * BLOCK_TOKENS > self.tokens:
            raise ValueError(f"blocks [{first_block}, {end}) are not full blocks of {self.tokens} tokens")
        if count == 0:
            return
        if self.states is not None:
            raise ValueError("blocks of a sequence with recurrent states cannot be dropped from the middle")
        tokens = self.tokens - count * BLOCK_TOKENS
        holes = [table.holes_after_drop(first_block, count) for table in self.tables]
        for table, remaining in zip(self.tables, holes, strict=True):
            self._check(table, tokens, remaining)
        behind = [table.blocks[end:] for table in self.tables]
        shared = [(g, n) for g, blocks in enumerate(behind) for n, b in enumerate(blocks) if self.manager.users(b) > 1]
        own = self.manager.allocate(len(shared))
        moved = [list(blocks) for blocks in behind]
        for (g, n), block in zip(shared, own, strict=True):
            moved[g][n] = block
        try:
            move([(behind[g][n], moved[g][n]) for g, n in shared], moved)
        except BaseException:
            self._release(own)
            raise
        self._release([behind[g][n] for g, n in shared])
        for table, blocks, remaining in zip(self.tables, moved, holes, strict=True):
            self._release(table.blocks[first_block:end])
            table.blocks[first_block:] = blocks
            table.holes = remaining
        self.tokens = tokens

    def fork(self) -> SequenceBlocks:
        """A sequence with the same content; blocks are shared until one of the two writes."""
        twin = SequenceBlocks(self.manager)
        twin.states = None if self.states is None else self.states.fork()
        twin.tables, twin.tokens = [table.fork() for table in self.tables], self.tokens
        for table in twin.tables:
            for block in table.blocks:
                if block != HOLE:
                    self.manager.retain(block)
        return twin

    def free(self) -> None:
        """Releases every block; the sequence is empty again."""
        self.crop(0)

    def table(self, group: int = 0) -> npt.NDArray[np.int32]:
        """Block ids of a group, int32 [blocks]."""
        return np.asarray(self.tables[group].blocks, dtype=np.int32)
