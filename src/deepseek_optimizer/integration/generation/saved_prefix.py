"""Saves the blocks of a text in the prefix cache to a file, and loads them from there."""

from __future__ import annotations

import os

from ...backends.base import BLOCK_TOKENS
from ...cache.block_manager import HOLE
from ...cache.prefix_cache import PrefixCache, keys
from ...checkpoint.saved_blocks import open_blocks, save_blocks
from ...errors import CacheFullError, CheckpointError
from ..bind.runtime import Runtime
from ..memory.arena import Arena
from .fingerprint import fingerprint


def save_prefix(
    path: str | os.PathLike[str], runtime: Runtime, arena: Arena, prefix: PrefixCache, tokens: list[int], salt: str = ""
) -> int:
    """Writes the prefix cache's blocks of a text to a file; writes no file if it has none.

    Args:
        path: the file to write.
        runtime: the model's runtime.
        arena: the memory of the blocks.
        prefix: the prefix cache.
        tokens: token ids of the text.
        salt: cache salt of the requests that processed it.

    Returns: the number of tokens saved.
    """
    wanted = keys(tokens, salt, len(tokens) // BLOCK_TOKENS)
    with arena.locked():
        tables = prefix.match(wanted)
        count = len(tables[0])
        slot = prefix.state_after(wanted[:count])
    blocks = [block for table in tables for block in table]
    held = [number for number, block in enumerate(blocks) if block != HOLE]
    try:
        if held:
            save_blocks(
                path,
                fingerprint(runtime),
                tokens[: count * BLOCK_TOKENS],
                (arena.read_block(blocks[number]) for number in held),
                numbers=held,
                block_tokens=BLOCK_TOKENS,
                block_bytes=arena.store.saved_bytes,
                groups=len(tables),
                state=b"" if slot is None else arena.read_state(slot),
            )
    finally:
        _release(arena, [blocks[number] for number in held], slot)
    return count * BLOCK_TOKENS


def load_prefix(
    path: str | os.PathLike[str],
    runtime: Runtime,
    arena: Arena,
    prefix: PrefixCache,
    tokens: list[int] | None = None,
    salt: str = "",
) -> int:
    """Loads the blocks of a file into the prefix cache: all of them, or none.

    Args:
        path: a file from `save_prefix`.
        runtime, arena, prefix, salt: as in `save_prefix`.
        tokens: token ids of the text that the file must belong to; None: any text.

    Returns: the number of tokens loaded.

    Raises:
        CheckpointError: the file is damaged, or belongs to another model, other settings or another text.
        CacheFullError: the cache has too few blocks.
    """
    saved = open_blocks(path)
    groups = len(arena.manager.groups)
    saved.check(fingerprint(runtime), BLOCK_TOKENS, arena.store.saved_bytes, arena.store.state_bytes, groups)
    if tokens is not None and saved.tokens != tokens[: len(saved.tokens)]:
        raise CheckpointError("contains the cache of another text; delete it and process this text again", file=path)
    numbers = saved.numbers
    count = len(numbers)
    with arena.locked() as manager:
        if count > manager.free_blocks:
            prefix.evict(count - manager.free_blocks)
        if count > manager.free_blocks:
            raise CacheFullError(count, manager.free_blocks)
        blocks, slot = manager.allocate(count), None
        if manager.slots is not None:
            try:
                (slot,) = manager.slots.allocate(1)
            except BaseException:
                for block in blocks:
                    manager.release(block)
                raise
    try:
        for block, data in zip(blocks, saved.blocks(), strict=True):
            arena.write_block(block, data)
        if slot is not None:
            arena.write_state(slot, saved.state())
        block_keys = keys(saved.tokens, salt, len(saved.tokens) // BLOCK_TOKENS)
        with arena.locked():
            for number, block in zip(numbers, blocks, strict=True):
                group, place = divmod(number, len(block_keys))
                prefix.put(block_keys[place], block, group)
            if slot is not None:
                prefix.put_state(block_keys[-1], slot)
    finally:
        _release(arena, blocks, slot)
    return len(saved.tokens)


def _release(arena: Arena, blocks: list[int], slot: int | None) -> None:
    with arena.locked() as manager:
        for block in blocks:
            manager.release(block)
        if slot is not None and manager.slots is not None:
            manager.slots.release(slot)
