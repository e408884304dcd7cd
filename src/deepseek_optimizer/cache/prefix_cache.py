"""Blocks that outlive their sequence, found again by what they hold: the prefix cache. No torch, no bytes.

A full block is known by a hash over its tokens and all before them, begun with a salt: sequences of different salts share
nothing, so that nobody can find out by timing what another has asked. (Hashing whole blocks: vLLM's automatic prefix caching.)
The cache itself is one user of each block it knows; a block with no other user can be taken away, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from .block_manager import BLOCK_TOKENS, HOLE, BlockManager

Key = bytes


def keys(tokens: list[int], salt: str, blocks: int, known: list[Key] | None = None, *, frequencies: int = 0) -> list[Key]:
    """Keys of the first `blocks` full blocks; `known` are those of the first few, found before. Blocks whose keys other
    `frequencies` have turned (0: the plain ones) are others."""
    found = list(known or ())
    start = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=frequencies.to_bytes(8, "little"))
    before = found[-1] if found else start.digest()
    for block in range(len(found), blocks):
        content = np.array(tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS], np.int32).tobytes()
        before = hashlib.blake2b(before + content, digest_size=16).digest()
        found.append(before)
    return found


class PrefixCache:
    """Call everything with the manager's lock held.

    Args:
        most: blocks to keep at most; None: as many as nobody else needs.
    """

    def __init__(self, manager: BlockManager, most: int | None = None) -> None:
        self.manager, self.most = manager, most
        self._blocks: OrderedDict[Key, int] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, wanted: list[Key]) -> list[int]:
        """The blocks of the longest known beginning of `wanted`, each with one user more: the caller's. What the token behind
        it does not see is a hole."""
        count, first = self.known(wanted), 0
        found = []
        if (forgetting := self.manager.forgetting) is not None:
            first = forgetting.first_seen(count * BLOCK_TOKENS)
        for n, key in enumerate(wanted[:count]):
            if forgetting is not None and forgetting.sink_blocks <= n < first:
                found.append(HOLE)
                continue
            self.manager.retain(self._blocks[key])
            found.append(self._blocks[key])
        self.touch(wanted[:count])
        return found

    def known(self, wanted: list[Key]) -> int:
        """How many blocks `match` would give."""
        first_unknown = next((n for n, key in enumerate(wanted) if key not in self._blocks), len(wanted))
        forgetting = self.manager.forgetting
        if forgetting is None or first_unknown < forgetting.sink_blocks:
            return first_unknown
        longest = run = first_unknown
        for n in range(first_unknown + 1, len(wanted) + 1):
            run = run + 1 if wanted[n - 1] in self._blocks else 0
            if run >= n - max(forgetting.sink_blocks, forgetting.first_seen(n * BLOCK_TOKENS)):
                longest = n
        return longest

    def put(self, key: Key, block: int) -> None:
        """Remembers a full block, unless it is a hole; if there is one with the same content already, that one stays."""
        if key in self._blocks or block == HOLE:
            return
        if self.most is not None and len(self._blocks) >= self.most and not self.evict(1):
            return
        self.manager.retain(block)
        self._blocks[key] = block

    def touch(self, used: list[Key]) -> None:
        """These were just used. Later blocks of a text become the older ones: without the earlier they are worth nothing."""
        for key in reversed(used):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def evict(self, count: int) -> int:
        """Forgets up to `count` blocks that nobody else uses.

        Returns: how many it were; so many more are free.
        """
        taken = list(self._unused(count))
        for key in taken:
            self.manager.release(self._blocks.pop(key))
        return len(taken)

    def _unused(self, count: int) -> Iterator[Key]:
        for key, block in self._blocks.items():
            if count == 0:
                return
            if self.manager.users(block) == 1:
                count -= 1
                yield key

    def can_evict(self, count: int) -> bool:
        """Whether so many blocks could be taken away."""
        return count <= 0 or sum(1 for _ in self._unused(count)) == count

    @property
    def unused(self) -> int:
        """Blocks that could be taken away. Looks at all of them."""
        return sum(self.manager.users(block) == 1 for block in self._blocks.values())

    def forget(self, keys: list[Key]) -> None:
        """These are no longer found."""
        for key in keys:
            if (block := self._blocks.pop(key, None)) is not None:
                self.manager.release(block)

    def forget_unused(self, keys: list[Key]) -> None:
        """Those of these that nobody else uses are no longer found."""
        self.forget([key for key in keys if (block := self._blocks.get(key)) is not None and self.manager.users(block) == 1])

    def clear(self) -> None:
        """Forgets everything; blocks that sequences use stay theirs."""
        for block in self._blocks.values():
            self.manager.release(block)
        self._blocks.clear()
