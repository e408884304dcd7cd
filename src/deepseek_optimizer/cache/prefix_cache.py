"""Prefix cache: blocks that outlive their sequence and are looked up by content. No torch, no bytes.

The key of a full block is a hash of its tokens and all tokens before it, seeded with a salt: sequences with different salts
share nothing, so that timing does not reveal what another client has sent. (Hashing whole blocks: vLLM's automatic prefix
caching.) The cache is itself one user of each block it holds; blocks without another user are evicted, least recently used
first.

With recurrent states, a prefix can only be continued where the states after it are stored. The cache holds slots with such
states by the key of the prefix's last block, and evicts them likewise.

The last block of an ended text is usually filled in part. It has a key like a full block, a hash of the tokens in it and of all
before. A text that continues from there takes it out of the cache, since it writes into it.

With several groups of layers, each group's blocks have keys of their own. A prefix can be continued if every group that attends
to all tokens has all of its blocks, and every group with a window those that the next token attends to. Blocks that a running
sequence has released stay in the cache until they are evicted, as the first ones.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from .block_manager import BLOCK_TOKENS, HOLE, BlockManager
from .forgetting import Groups, kept_whole
from .prefix_parts import STATES, Part, kept, longest, seen
from .prefix_parts import Key as Key


def keys(
    tokens: list[int],
    salt: str,
    blocks: int,
    known: list[Key] | None = None,
    *,
    frequencies: int = 0,
    adapter: bytes = b"",
    quality: bytes = b"",
    besides: Callable[[int, int], bytes] = lambda begin, end: b"",
) -> list[Key]:
    """Keys of the first `blocks` full blocks.

    Args:
        tokens: token ids of the sequence.
        salt: sequences share blocks only if their salts are equal.
        known: keys of the first few blocks, computed earlier.
        frequencies: number of the RoPE frequencies that the cached keys were rotated with; 0: the model's own.
        adapter: identity of the adapter that the cached keys and values were computed with; b"": none.
        quality: identifies the precision of the weights that they were computed with, at most 16 bytes; b"": all of it.
        besides: identifies what tokens [begin, end) are besides their ids (pictures); b"": nothing.
    """
    result = list(known or ())
    person = frequencies.to_bytes(8, "little")
    start = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=person, key=adapter, salt=quality)
    before = result[-1] if result else start.digest()
    for block in range(len(result), blocks):
        begin, end = block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS
        content = np.array(tokens[begin:end], np.int32).tobytes() + besides(begin, end)
        before = _key_of(before, content)
        result.append(before)
    return result


def partial_keys(
    tokens: list[int], begin: int, before: Key, besides: Callable[[int, int], bytes] = lambda begin, end: b""
) -> list[Key]:
    """Keys of the texts that end in the block after a full one: after all of `tokens`, after all but the last, and so on.

    Args:
        tokens: the next tokens of a text, less than a block.
        begin: number of the first of them.
        before: key of the last full block.
        besides: as in `keys`.
    """
    content, counts = np.array(tokens, np.int32), range(len(tokens), 0, -1)
    return [_key_of(before, content[:n].tobytes() + besides(begin, begin + n)) for n in counts]


def _key_of(before: Key, content: bytes) -> Key:
    return hashlib.blake2b(before + content, digest_size=16).digest()


def of_group(key: Key, group: int) -> Key:
    """The key of a group's block. In the first group, it is the key of the prefix."""
    return key + group.to_bytes(4, "little") if group else key


def _of_owner(key: Key, owner: int) -> Key:
    """The key of an unconfirmed block."""
    return key + b"?" + owner.to_bytes(8, "little")


class PrefixCache:
    """All methods must be called with the manager's lock held.

    Args:
        max_blocks: maximum number of blocks to keep; None: all that nothing else needs.
        whole: match only prefixes of which no block is missing, for sequences that release none.

    Attributes:
        removals: changes whenever something is removed.
    """

    def __init__(self, manager: BlockManager, max_blocks: int | None = None, whole: bool = False) -> None:
        self.manager, self.max_blocks = manager, max_blocks
        self.groups: Groups = kept_whole(manager.groups) if whole else manager.groups
        self._blocks: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._slots: OrderedDict[Key, int] = OrderedDict()  # of recurrent states
        self.removals = 0
        if manager.slots is not None:
            manager.slots.reclaim = self.evict_states

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, wanted: list[Key], partial: Callable[[int], list[Key]] | None = None) -> list[list[int]]:
        """Blocks of the longest cached prefix of `wanted`, in each group. The caller becomes a user of each. Blocks that the
        token after the prefix does not attend to are holes. `partial`: as in `known`."""
        prefix = wanted[: self.known(wanted, partial)]
        tables = []
        for group, forgetting in enumerate(self.groups):
            blocks = [HOLE] * len(prefix)
            for n in seen(forgetting, len(prefix)):
                blocks[n] = self._blocks[of_group(prefix[n], group)]
                self.manager.retain(blocks[n])
            tables.append(blocks)
        self.touch(prefix)
        return tables

    def known(self, wanted: list[Key], partial: Callable[[int], list[Key]] | None = None) -> int:
        """Number of blocks per group that `match` would return.

        Args:
            partial: keys of the partly filled blocks from which the caller could continue after a number of full blocks. If
                one can be taken, the recurrent states after the full blocks are not needed.
        """

        counts = {} if partial is None else {key: count for count, key in enumerate(wanted, 1)}

        def has(key: Key, group: int) -> bool:
            if self.has(key, group) or group != STATES or partial is None:
                return self.has(key, group)
            return self._untaken(partial(counts[key])) is not None

        return longest(wanted, self.groups, self.manager.slots is not None, has)

    def has(self, key: Key, group: int) -> bool:
        """Whether a block of a group, or the states after a block (group STATES), are cached."""
        return key in self._slots if group == STATES else of_group(key, group) in self._blocks

    def place(self, part: Part) -> int | None:
        """The block of a part, or its slot if these are states; None: it is not cached."""
        key, group = part
        return self._slots.get(key) if group == STATES else self._blocks.get(of_group(key, group))

    def put(self, key: Key, block: int, group: int = 0) -> None:
        """Adds a full block, unless it is a hole or a block with the same content is cached already.

        Args:
            key: key of the prefix that ends with the block.
            block: its id.
            group: the group of layers whose keys and values it holds.
        """
        key = of_group(key, group)
        if key in self._blocks or block == HOLE:
            return
        if self.max_blocks is not None and len(self._blocks) >= self.max_blocks and not self.evict(1):
            return
        self.manager.retain(block)
        self._blocks[key] = block

    def state_after(self, prefix: list[Key]) -> int | None:
        """The slot with the recurrent states after these blocks, which `match` returned; the caller becomes its user. None: the
        model has no such states, there are no blocks, or a partly filled block has the states."""
        if self.manager.slots is None or not prefix or (slot := self._slots.get(prefix[-1])) is None:
            return None
        self.manager.slots.retain(slot)
        return slot

    def take_partial(self, candidates: list[Key]) -> tuple[int, list[int], int | None] | None:
        """Takes the first of some partly filled blocks that is cached, in all groups and with its states, out of the cache. The
        caller takes over the cache's use of the blocks and of the slot.

        Returns: its index in `candidates`, its block in each group, and the slot of the states; None: none is cached, or others
            use it.
        """
        index = self._untaken(candidates)
        if index is None:
            return None
        key = candidates[index]
        blocks = [self._blocks.pop(of_group(key, group)) for group in range(len(self.groups))]
        self.removals += 1
        return index, blocks, self._slots.pop(key, None)

    def _untaken(self, candidates: list[Key]) -> int | None:
        """Index of the first of some partly filled blocks that is cached, with its states, and that no sequence uses."""
        slots = self.manager.slots
        for index, key in enumerate(candidates):
            if not all(self.has(*part) for part in self.parts_of(key)):
                continue
            blocks = [self._blocks[of_group(key, group)] for group in range(len(self.groups))]
            slot = self._slots.get(key)
            if any(self.manager.users(block) > 1 for block in blocks) or (slots and slot is not None and slots.users(slot) > 1):
                continue
            return index
        return None

    def parts_of(self, key: Key) -> list[Part]:
        """The parts of a partly filled block: it in each group, and the states after its last token."""
        parts = [(key, group) for group in range(len(self.groups))]
        return parts if self.manager.slots is None else [*parts, (key, STATES)]

    def put_state(self, key: Key, slot: int) -> None:
        """Adds the slot of the states after a block, unless such states are cached already."""
        if key not in self._slots and self.manager.slots is not None:
            self.manager.slots.retain(slot)
            self._slots[key] = slot

    def put_unconfirmed_state(self, key: Key, slot: int, owner: int) -> None:
        """Holds the slot of the states after a block, which cannot be matched yet: its sequence frees it before it is known
        whether its content is valid.

        Args:
            key, slot: as in `put_state`.
            owner: identifies the sequence.
        """
        self.put_state(_of_owner(key, owner), slot)

    def confirm_state(self, key: Key, owner: int) -> None:
        """Adds the unconfirmed states as `put_state` does, if they are still held."""
        private = _of_owner(key, owner)
        if (slot := self._slots.get(private)) is not None:
            self.put_state(key, slot)
            self._forget_state(private)

    def forget_unconfirmed_states(self, keys: list[Key], owner: int) -> None:
        """Removes unconfirmed states."""
        for key in keys:
            self._forget_state(_of_owner(key, owner))

    def evict_states(self, count: int) -> int:
        """Evicts up to `count` slots that have no other user; returns their number."""
        slots = self.manager.slots
        if slots is None:
            return 0
        taken = [key for key, slot in self._slots.items() if slots.users(slot) == 1][:count]
        for key in taken:
            slots.release(self._slots.pop(key))
        self.removals += len(taken)
        return len(taken)

    @property
    def unused_states(self) -> int:
        """Number of slots that could be evicted."""
        slots = self.manager.slots
        return 0 if slots is None else sum(slots.users(slot) == 1 for slot in self._slots.values())

    def _forget_state(self, key: Key) -> None:
        if self.manager.slots is not None and (slot := self._slots.pop(key, None)) is not None:
            self.manager.slots.release(slot)
            self.removals += 1

    def touch(self, used: list[Key]) -> None:
        """Marks the blocks of a prefix as just used. Later blocks of a text count as older, since they are useless without the
        earlier ones. If some groups of layers attend to every token, the others' blocks count only as far as a sequence of this
        prefix keeps them (`Forgetting.first_kept`): this prefix does not need the rest."""
        for key, group in reversed(self.parts(used)):
            if group == STATES:
                self._slots.move_to_end(key)
            else:
                self._blocks.move_to_end(of_group(key, group))

    def parts(self, prefix: list[Key]) -> list[Part]:
        """The cached parts of a prefix, the earlier blocks first: all states and blocks; if some groups of layers attend to
        every token, of the others' blocks only those that a sequence of this prefix keeps."""
        forgets = self.manager.forgetting is not None
        places = [range(len(prefix)) if forgets else set(kept(forgetting, len(prefix))) for forgetting in self.groups]
        parts: list[Part] = []
        for n, key in enumerate(prefix):
            parts += [(key, group) for group, some in enumerate(places) if n in some and self.has(key, group)]
            if key in self._slots:
                parts.append((key, STATES))
        return parts

    def expire(self, keys: list[Key], group: int) -> None:
        """Makes these blocks of a group, if cached, the first to be evicted."""
        for key in keys:
            if (key := of_group(key, group)) in self._blocks:
                self._blocks.move_to_end(key, last=False)

    def evict(self, count: int) -> int:
        """Evicts up to `count` blocks that have no other user.

        Returns: number of blocks that became free.
        """
        taken = list(self._unused(count))
        for key in taken:
            self.manager.release(self._blocks.pop(key))
            self._forget_state(key)
        self.removals += len(taken)
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

    def put_unconfirmed(self, key: Key, block: int, group: int, owner: int) -> None:
        """Holds a full block that cannot be matched yet, and is evicted before all others: its sequence releases it before it
        is known whether its content is valid.

        Args:
            key, block, group: as in `put`.
            owner: identifies the sequence.
        """
        private = _of_owner(key, owner)
        self.put(private, block, group)
        self.expire([private], group)

    def confirm(self, key: Key, group: int, owner: int) -> None:
        """Adds the unconfirmed block as `put` does, if it is still held; others are evicted after it."""
        if (block := self._blocks.pop(of_group(_of_owner(key, owner), group), None)) is not None:
            self.put(key, block, group)
            self.expire([key], group)
            self.manager.release(block)

    def forget_unconfirmed(self, keys: list[Key], group: int, owner: int) -> None:
        """Removes unconfirmed blocks."""
        self._remove([of_group(_of_owner(key, owner), group) for key in keys])

    def forget(self, keys: list[Key]) -> None:
        """Removes the blocks of all groups from the cache."""
        for group in range(len(self.groups)):
            self._remove([of_group(key, group) for key in keys])

    def forget_unused(self, keys: list[Key], group: int = 0) -> None:
        """Removes those blocks of a group that have no other user."""
        keys = [of_group(key, group) for key in keys]
        self._remove([key for key in keys if (block := self._blocks.get(key)) is not None and self.manager.users(block) == 1])

    def _remove(self, keys: list[Key]) -> None:
        for key in keys:
            if (block := self._blocks.pop(key, None)) is not None:
                self.manager.release(block)
                self._forget_state(key)
                self.removals += 1

    def clear(self) -> None:
        """Removes all blocks from the cache; sequences keep theirs."""
        for block in self._blocks.values():
            self.manager.release(block)
        self.removals += len(self._blocks)
        self._blocks.clear()
        for key in list(self._slots):
            self._forget_state(key)
