"""The last, partly filled block of a text in the prefix cache: a text that continues it computes only what is new. No torch.

Texts whose window has slid share full blocks only.
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
    return _keys(running, begin, end)


def _keys(running: Running, begin: int, end: int) -> list[Key]:
    """Keys of the tokens from `begin` on, where the last full block ends, up to `end` and to each token before."""
    pictures, before = running.request.pictures, running.keys[begin // BLOCK_TOKENS - 1]
    besides = {} if pictures is None else {"besides": pictures.digest}
    return partial_keys(running.sequence.tokens[begin:end], begin, before, **besides)


def _possible(running: Running, blocks: int) -> bool:
    """Whether a request may share a partly filled block after this number of full blocks."""
    return blocks > 0 and running.shareable is None


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
    key = _keys(running, begin, begin + count)[0]
    for group, table in enumerate(blocks.tables):
        prefix.put(key, table.blocks[full], group)
    if slot is not None:
        prefix.put_state(key, slot)
    return prefix.parts_of(key)
