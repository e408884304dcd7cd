"""The last, partly filled block of a text in the prefix cache: a text that continues it computes only what is new. No torch.

Texts with pictures, and those whose window has slid, share full blocks only.
"""

from __future__ import annotations

from ...cache.block_manager import BLOCK_TOKENS
from ...cache.prefix_cache import Key, PrefixCache, partial_keys
from ...cache.prefix_parts import Part
from ..running import Running


def candidates(running: Running, blocks: int) -> list[Key]:
    """Keys of the partly filled blocks from which a request could continue, the fullest first.

    Args:
        running: the request; the keys of these full blocks are computed.
        blocks: number of full blocks before.
    """
    if not _possible(running, blocks):
        return []
    begin = blocks * BLOCK_TOKENS
    end = min(running.reusable, begin + BLOCK_TOKENS - 1)
    return partial_keys(running.sequence.tokens[begin:end], running.keys[blocks - 1])


def _possible(running: Running, blocks: int) -> bool:
    """Whether a request may share a partly filled block after this number of full blocks."""
    return blocks > 0 and running.shareable is None and running.request.pictures is None


def adopt(running: Running, prefix: PrefixCache) -> None:
    """Lets an admitted request continue from a partly filled block, if there is one after the full blocks that it has adopted.
    The lock must be held."""
    blocks = running.sequence.blocks
    keys = candidates(running, len(blocks.blocks))
    if (taken := prefix.take_partial(keys)) is not None:
        index, ids, slot = taken
        blocks.adopt_partial(ids, len(keys) - index, slot)


def put(running: Running, prefix: PrefixCache) -> list[Part]:
    """Adds a request's last block to the cache before the request frees it, if the block is filled in part; returns its parts.
    The lock must be held."""
    blocks, full = running.sequence.blocks, running.registered
    count = min(running.confirmed, blocks.tokens) - full * BLOCK_TOKENS
    slot = None if blocks.states is None else blocks.states.stored.get(full * BLOCK_TOKENS + count)
    if not _possible(running, full) or not 0 < count < BLOCK_TOKENS or (blocks.states is not None and slot is None):
        return []
    begin = full * BLOCK_TOKENS
    key = partial_keys(running.sequence.tokens[begin : begin + count], running.keys[full - 1])[0]
    for group, table in enumerate(blocks.tables):
        prefix.put(key, table.blocks[full], group)
    if slot is not None:
        prefix.put_state(key, slot)
    return prefix.parts_of(key)
