"""Prefix cache: blocks that outlive their sequence and are looked up by content. No torch, no bytes.

The key of a full block is a hash of its tokens and all tokens before it, seeded with a salt: sequences with different salts
share nothing, so that timing does not reveal what another client has sent. (Hashing whole blocks: vLLM's automatic prefix
caching.) The cache is itself one user of each block it holds; blocks without another user are evicted, least recently used
first.

With recurrent states, a prefix can only be continued where the states after it are stored. The cache holds slots with such
states by the key of the prefix's last block, and evicts them likewise.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from .block_manager import BLOCK_TOKENS, HOLE, BlockManager

Key = bytes


def keys(tokens: list[int], salt: str, blocks: int, known: list[Key] | None = None, *, frequencies: int = 0) -> list[Key]:
    """Keys of the first `blocks` full blocks.

    Args:
        tokens: token ids of the sequence.
        salt: sequences share blocks only if their salts are equal.
        known: keys of the first few blocks, computed earlier.
        frequencies: number of the RoPE frequencies that the cached keys were rotated with; 0: the model's own.
    """
    result = list(known or ())
    start = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=frequencies.to_bytes(8, "little"))
    before = result[-1] if result else start.digest()
    for block in range(len(result), blocks):
        content = np.array(tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS], np.int32).tobytes()
        before = hashlib.blake2b(before + content, digest_size=16).digest()
        result.append(before)
    return result


class PrefixCache:
    """All methods must be called with the manager's lock held.

    Args:
        max_blocks: maximum number of blocks to keep; None: all that nothing else needs.
    """

    def __init__(self, manager: BlockManager, max_blocks: int | None = None) -> None:
        self.manager, self.max_blocks = manager, max_blocks
        self._blocks: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._slots: OrderedDict[Key, int] = OrderedDict()  # of recurrent states
        if manager.slots is not None:
            manager.slots.reclaim = self.evict_states

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, wanted: list[Key]) -> list[int]:
        """Blocks of the longest cached prefix of `wanted`. The caller becomes a user of each. Blocks that the token after the
        prefix does not attend to are holes."""
        count, first = self.known(wanted), 0
        blocks = []
        if (forgetting := self.manager.forgetting) is not None:
            first = forgetting.first_seen(count * BLOCK_TOKENS)
        for n, key in enumerate(wanted[:count]):
            if forgetting is not None and forgetting.sink_blocks <= n < first:
                blocks.append(HOLE)
                continue
            self.manager.retain(self._blocks[key])
            blocks.append(self._blocks[key])
        self.touch(wanted[:count])
        return blocks

    def known(self, wanted: list[Key]) -> int:
        """Number of blocks that `match` would return."""
        first_unknown = next((n for n, key in enumerate(wanted) if key not in self._blocks), len(wanted))
        longest = next((n for n in range(first_unknown, 0, -1) if self._has_state(wanted[n - 1])), 0)
        forgetting = self.manager.forgetting
        if forgetting is None or first_unknown < forgetting.sink_blocks:
            return longest
        run = first_unknown
        for n in range(first_unknown + 1, len(wanted) + 1):
            run = run + 1 if wanted[n - 1] in self._blocks else 0
            if run >= n - max(forgetting.sink_blocks, forgetting.first_seen(n * BLOCK_TOKENS)) and self._has_state(
                wanted[n - 1]
            ):
                longest = n
        return longest

    def _has_state(self, key: Key) -> bool:
        return self.manager.slots is None or key in self._slots

    def put(self, key: Key, block: int) -> None:
        """Adds a full block, unless it is a hole or a block with the same content is cached already."""
        if key in self._blocks or block == HOLE:
            return
        if self.max_blocks is not None and len(self._blocks) >= self.max_blocks and not self.evict(1):
            return
        self.manager.retain(block)
        self._blocks[key] = block

    def state_after(self, prefix: list[Key]) -> int | None:
        """The slot with the recurrent states after these blocks, which `match` returned; the caller becomes its user. None: the
        model has no such states, or there are no blocks."""
        if self.manager.slots is None or not prefix:
            return None
        slot = self._slots[prefix[-1]]
        self.manager.slots.retain(slot)
        return slot

    def put_state(self, key: Key, slot: int) -> None:
        """Adds the slot of the states after a block, unless such states are cached already."""
        if key not in self._slots and self.manager.slots is not None:
            self.manager.slots.retain(slot)
            self._slots[key] = slot

    def evict_states(self, count: int) -> int:
        """Evicts up to `count` slots that have no other user; returns their number."""
        slots = self.manager.slots
        if slots is None:
            return 0
        taken = [key for key, slot in self._slots.items() if slots.users(slot) == 1][:count]
        for key in taken:
            slots.release(self._slots.pop(key))
        return len(taken)

    @property
    def unused_states(self) -> int:
        """Number of slots that could be evicted."""
        slots = self.manager.slots
        return 0 if slots is None else sum(slots.users(slot) == 1 for slot in self._slots.values())

    def _forget_state(self, key: Key) -> None:
        if self.manager.slots is not None and (slot := self._slots.pop(key, None)) is not None:
            self.manager.slots.release(slot)

    def touch(self, used: list[Key]) -> None:
        """Marks blocks as just used. Later blocks of a text count as older, since they are useless without the earlier ones."""
        for key in reversed(used):
            for held in (self._blocks, self._slots):
                if key in held:
                    held.move_to_end(key)

    def evict(self, count: int) -> int:
        """Evicts up to `count` blocks that have no other user.

        Returns: number of blocks that became free.
        """
        taken = list(self._unused(count))
        for key in taken:
            self.manager.release(self._blocks.pop(key))
            self._forget_state(key)
        return len(taken)

    def _unused(self, count: int) -> Iterator[Key]:
        for key, block in self._blocks.items():
            if count == 0:
                return
            if self.manager.users(block) == 1:
                count -= 1
                yield key

    def can_evict(self, count: int) -> bool:
        """Whether `count` blocks could be evicted."""
        return count <= 0 or sum(1 for _ in self._unused(count)) == count

    @property
    def unused(self) -> int:
        """Number of blocks that could be evicted. Visits all of them."""
        return sum(self.manager.users(block) == 1 for block in self._blocks.values())

    def forget(self, keys: list[Key]) -> None:
        """Removes blocks from the cache."""
        for key in keys:
            if (block := self._blocks.pop(key, None)) is not None:
                self.manager.release(block)
                self._forget_state(key)

    def forget_unused(self, keys: list[Key]) -> None:
        """Removes those of the blocks that have no other user."""
        self.forget([key for key in keys if (block := self._blocks.get(key)) is not None and self.manager.users(block) == 1])

    def clear(self) -> None:
        """Removes all blocks from the cache; sequences keep theirs."""
        for block in self._blocks.values():
            self.manager.release(block)
        self._blocks.clear()
        for key in list(self._slots):
            self._forget_state(key)
