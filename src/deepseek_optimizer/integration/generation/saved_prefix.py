"""Saves the blocks of a text in the prefix cache to a file, and loads them from there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch

from ...backends.base import BLOCK_TOKENS
from ...cache.block_manager import HOLE
from ...cache.prefix_cache import PrefixCache, keys
from ...checkpoint.saved_blocks import open_blocks, save_blocks
from ...errors import CacheFullError, CheckpointError
from ...quant.packed import PackedWeight
from ..bind.runtime import Runtime
from ..bind.swap import weights_of
from ..memory.arena import Arena

_SAMPLE = 4096  # bytes hashed at the beginning and end of each weight, to distinguish models of the same shape


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


def fingerprint(runtime: Runtime) -> dict[str, str]:
    """Hashes or names of everything that the contents of a cache depend on: the graph (with RoPE and attention), the weights
    and their formats, the cache's format, and the backend."""
    weights = weights_of(runtime.model, runtime.graph)
    formats = {name: w.format if isinstance(w, PackedWeight) else str(w.dtype) for name, w in weights.items()}
    return {
        "model": _hash([[node.op, node.weights, _plain(node.attrs)] for node in runtime.graph.nodes]),
        "weights": _hash([[name, _sample(weights[name])] for name in sorted(weights)]),
        "weight format": _hash(formats),
        "activation format": runtime.config.activation,
        "KV cache format": runtime.kv_dtype,
        "backend": runtime.backend.name,
    }


def _release(arena: Arena, blocks: list[int], slot: int | None) -> None:
    with arena.locked() as manager:
        for block in blocks:
            manager.release(block)
        if slot is not None and manager.slots is not None:
            manager.slots.release(slot)


def _sample(weight: Any) -> str:
    data = (weight.data if isinstance(weight, PackedWeight) else weight).detach().reshape(-1)
    count = max(1, _SAMPLE // data.element_size())
    ends = torch.cat([data[:count], data[-count:]]).cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(ends.tobytes() + str(tuple(data.shape)).encode(), digest_size=16).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """A JSON value of a graph attribute, equal for equal attributes in every process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, partial):  # the frequencies of dynamic RoPE
        return [value.func.__qualname__, _plain(value.args), _plain(value.keywords)]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, Enum) or value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise TypeError(f"a graph attribute of type {type(value).__name__} has no fingerprint")
