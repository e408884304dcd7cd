"""Cache blocks in a file: the KV cache of a text, for use by another process. No torch.

    8 bytes "DSOBLOCK" | uint32 format version | uint32 length of the header | header, JSON
    | tokens, int32 [n] | BLAKE2b-128 of everything before | for each block: BLAKE2b-128 of its number and bytes, its bytes
    | for a model with recurrent states: BLAKE2b-128 of the states after the last token, the states

All integers are little-endian. If a length, a checksum or the model it was made with does not match, the error names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError
from .atomic import atomic_file

_MAGIC, _VERSION = b"DSOBLOCK", 1
_START = struct.Struct("<8sII")
_MAX_HEADER = 1 << 20
_DIGEST = 16
_SIZES = ("tokens", "block_tokens", "block_bytes")


@dataclass(frozen=True)
class SavedBlocks:
    """An open file; its header and tokens have been checked.

    Attributes:
        path: the file.
        made_with: properties that the blocks' bytes depend on, by name, as given to `save_blocks`.
        tokens: token ids of the text.
        held: the stored blocks, as [begin, end) runs; the others are not needed any more. The blocks of a text's n-th group of
            layers follow those of the group before.
        block_tokens, block_bytes: tokens and bytes of a block.
        state_bytes: bytes of the recurrent states; 0: the model has none.
        groups: number of groups of layers, each of which has blocks of its own.
    """

    path: Path
    made_with: Mapping[str, Any]
    tokens: list[int]
    held: list[list[int]]
    block_tokens: int
    block_bytes: int
    state_bytes: int
    groups: int
    _begin: int

    @property
    def numbers(self) -> list[int]:
        """Indices of the stored blocks: in the text, plus, for each earlier group, the number of the text's blocks."""
        return _numbers(self.held)

    def check(
        self, made_with: Mapping[str, Any], block_tokens: int, block_bytes: int, state_bytes: int = 0, groups: int = 1
    ) -> None:
        """Raises CheckpointError if the blocks were made with other properties."""
        names = sorted({*made_with, *self.made_with})
        other = [name for name in names if made_with.get(name) != self.made_with.get(name)]
        if not other and (block_tokens, block_bytes, groups) != (self.block_tokens, self.block_bytes, self.groups):
            other = ["block size"]
        if not other and state_bytes != self.state_bytes:
            other = ["state size"]
        if other:
            raise CheckpointError(
                f"was made with another {', '.join(other)}; delete it and process the text again, or load the model with the "
                "earlier settings",
                file=self.path,
            )

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the stored blocks, in order. Raises CheckpointError at a damaged block."""
        with self.path.open("rb") as file:
            file.seek(self._begin)
            for number in self.numbers:
                digest, data = file.read(_DIGEST), file.read(self.block_bytes)
                if len(data) != self.block_bytes or _block_digest(number, data) != digest:
                    raise CheckpointError(
                        f"block {number} is damaged; delete the file and process the text again", file=self.path
                    )
                yield data

    def state(self) -> bytes:
        """The recurrent states after the last token. Raises CheckpointError if they are damaged."""
        with self.path.open("rb") as file:
            file.seek(self._begin + len(self.numbers) * (_DIGEST + self.block_bytes))
            digest, data = file.read(_DIGEST), file.read(self.state_bytes)
        if len(data) != self.state_bytes or _digest(data) != digest:
            raise CheckpointError("has damaged states; delete the file and process the text again", file=self.path)
        return data


def save_blocks(
    path: str | os.PathLike[str],
    made_with: Mapping[str, Any],
    tokens: list[int],
    blocks: Iterable[bytes],
    *,
    numbers: list[int],
    block_tokens: int,
    block_bytes: int,
    groups: int = 1,
    state: bytes = b"",
) -> None:
    """Writes a file atomically.

    Args:
        path: the file.
        made_with: properties that the blocks' bytes depend on, by name, as JSON types.
        tokens: token ids of the text; block n holds `block_tokens` of them, from n * block_tokens.
        blocks: bytes of the blocks to store.
        numbers: indices of these blocks, ascending, as in `SavedBlocks`.
        block_tokens, block_bytes: tokens and bytes of a block.
        groups: number of groups of layers.
        state: the recurrent states after the last token; empty: the model has none.
    """
    fields = {
        "made_with": made_with, "tokens": len(tokens), "held": _runs(numbers), "block_tokens": block_tokens,
        "block_bytes": block_bytes,
    }  # fmt: skip
    if groups > 1:
        fields["groups"] = groups
    if state:
        fields["state_bytes"] = len(state)
    header = json.dumps(fields, sort_keys=True).encode()
    head = _START.pack(_MAGIC, _VERSION, len(header)) + header + np.array(tokens, "<i4").tobytes()
    with atomic_file(path) as file:
        file.write(head + _digest(head))
        for number, data in zip(numbers, blocks, strict=True):
            if len(data) != block_bytes or number >= len(tokens) // block_tokens * groups:
                raise ValueError(f"block {number} of {len(tokens)} tokens has {len(data)} bytes instead of {block_bytes}")
            file.write(_block_digest(number, data) + data)
        if state:
            file.write(_digest(state) + state)


def open_blocks(path: str | os.PathLike[str]) -> SavedBlocks:
    """Opens a file and checks everything but its blocks, which are checked when they are read.

    Raises:
        CheckpointError: not a file of saved blocks, another version, truncated or damaged.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_START.size)
        if len(start) < _START.size or start[:8] != _MAGIC:
            raise CheckpointError("is not a file of saved cache blocks", file=path)
        _, version, length = _START.unpack(start)
        if version != _VERSION:
            raise CheckpointError(f"has version {version}, but {_VERSION} is supported; process the text again", file=path)
        fields, header = _header(file, path, size, length)
        count, block_tokens, block_bytes = (fields[name] for name in _SIZES)
        begin = _START.size + length + 4 * count + _DIGEST
        state_bytes = fields.get("state_bytes", 0)
        expected = begin + sum(end - first for first, end in fields["held"]) * (_DIGEST + block_bytes)
        expected += _DIGEST + state_bytes if state_bytes else 0
        if size != expected:
            raise CheckpointError(f"has {size:,} bytes instead of {expected:,}; process the text again", file=path)
        tokens = file.read(4 * count)
        if file.read(_DIGEST) != _digest(start + header + tokens):
            raise CheckpointError("has a damaged header; delete it and process the text again", file=path)
    ids = np.frombuffer(tokens, "<i4").tolist()
    groups = fields.get("groups", 1)
    return SavedBlocks(path, fields["made_with"], ids, fields["held"], block_tokens, block_bytes, state_bytes, groups, begin)


def _header(file: BinaryIO, path: Path, size: int, length: int) -> tuple[dict[str, Any], bytes]:
    damaged = CheckpointError("has a damaged header; delete it and process the text again", file=path)
    if length > min(_MAX_HEADER, size):
        raise damaged
    header = file.read(length)
    try:
        fields = json.loads(header)
        good = isinstance(fields["made_with"], dict) and all(
            type(fields[name]) is int and 0 < fields[name] <= size for name in _SIZES
        )
        good = good and type(state := fields.get("state_bytes", 0)) is int and 0 <= state <= size
        good = good and type(groups := fields.get("groups", 1)) is int and 0 < groups <= size
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if not good or not _are_runs(fields.get("held"), fields["tokens"] // fields["block_tokens"] * groups):
        raise damaged
    return fields, header


def _runs(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers as [begin, end) runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


def _numbers(runs: list[list[int]]) -> list[int]:
    return [number for begin, end in runs for number in range(begin, end)]


def _are_runs(runs: Any, blocks: int) -> bool:
    """Whether these are ascending runs of numbers below `blocks`."""
    if not isinstance(runs, list) or not all(isinstance(run, list) and [type(n) for n in run] == [int, int] for run in runs):
        return False
    ends = [0, *(n for run in runs for n in run), blocks]
    return all(a <= b for a, b in zip(ends, ends[1:], strict=False)) and all(begin < end for begin, end in runs)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _block_digest(number: int, data: bytes) -> bytes:
    """Includes the number, so that swapped blocks are detected."""
    return hashlib.blake2b(data, digest_size=_DIGEST, salt=number.to_bytes(8, "little")).digest()
