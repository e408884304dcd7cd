"""The base of caches in torch: blocks as rows of tensors, whose memory grows with use."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from ...errors import BackendError
from ...graph.rope_rotation import KeyRotation
from ..base import BLOCK_TOKENS, Int32
from .states import StateSlots, state_bytes


class BlockTensors:
    """Blocks stored in tensors [blocks, ...]. Memory grows with the highest block written."""

    def __init__(self, block_bytes: int, kv_dtype: str, num_blocks: int) -> None:
        self.block_bytes, self.kv_dtype, self.num_blocks = block_bytes, kv_dtype, num_blocks
        self.states = StateSlots((), 0, torch.device("cpu"))  # `make_store` sets those of a graph
        self._data: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []  # of codes

    @property
    def held_blocks(self) -> int:
        return len(self._data[0])

    @property
    def held_states(self) -> int:
        """None: slots are allocated as they are written."""
        return 0

    def copy_block(self, source: int, target: int) -> None:
        self._grow(max(source, target) + 1)
        for tensor in self._tensors:
            tensor[target] = tensor[source]

    def release(self, from_block: int) -> None:
        self._resize(min(from_block, len(self._data[0])))

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """All tensors with elements: an indexer's keys may have width 0."""
        return [tensor for tensor in (*self._data, *self._scales) if tensor.shape[-1]]

    @property
    def saved_bytes(self) -> int:
        return sum(t.element_size() * math.prod(t.shape[1:]) for t in self._tensors)

    def read_block(self, block: int) -> bytes:
        self._grow(block + 1)
        return b"".join(t[block].contiguous().cpu().view(torch.uint8).numpy().tobytes() for t in self._tensors)

    def write_block(self, block: int, data: bytes) -> None:
        if len(data) != self.saved_bytes:
            raise ValueError(f"a block has {self.saved_bytes} bytes, got {len(data)}")
        self._grow(block + 1)
        rest, at = bytearray(data), 0
        for tensor in self._tensors:
            row = tensor[block]
            row.copy_(torch.frombuffer(rest, dtype=tensor.dtype, count=row.numel(), offset=at).view(row.shape))
            at += row.nbytes

    @property
    def num_states(self) -> int:
        return self.states.slots

    @property
    def state_bytes(self) -> int:
        return state_bytes(self.states.specs)

    def copy_state(self, source: int, target: int) -> None:
        self.states.copy(source, target)

    def release_states(self, from_slot: int) -> None:
        self.states.release(from_slot)

    def read_state(self, slot: int) -> bytes:
        return self.states.read_bytes(slot)

    def write_state(self, slot: int, data: bytes) -> None:
        self.states.write_bytes(slot, data)

    def rotate(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int, group: int = 0) -> None:
        rotation.check(position + tokens)
        if min(position, position + delta) < 0 or tokens < 0:
            raise ValueError(f"{tokens} tokens from position {position} cannot move by {delta}")
        table = self._table(block_table, tokens)[: -(-tokens // BLOCK_TOKENS)]
        if len(table.unique()) != len(table) or (table < 0).any():
            raise ValueError(f"block_table must have distinct, non-negative blocks, got {table.tolist()}")
        if delta and tokens:
            angles = _angle_table(rotation.inv_freq, position, len(table) * BLOCK_TOKENS, delta, table.device)
            rotated = list(self._rotated(rotation, table, angles, group))  # computed before anything is written
            for tensor, rows in rotated:
                tensor[table] = rows.to(tensor.dtype)

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The tensors that the rotation changes, each with its new rows for the blocks."""
        raise NotImplementedError

    def _places(self, table: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and slots of a sequence's tokens [start, start + count); allocates memory for them."""
        tokens = torch.arange(start, start + count, device=table.device, dtype=torch.int64)
        blocks = table[tokens // BLOCK_TOKENS]
        self._grow(int(blocks.max()) + 1)
        return blocks, tokens % BLOCK_TOKENS

    def _table(self, block_table: Int32, tokens: int) -> torch.Tensor:
        table = torch.from_numpy(block_table).to(self._data[0].device, torch.int64)
        if len(table) * BLOCK_TOKENS < tokens:
            raise BackendError(f"block_table has {len(table)} blocks, too few for {tokens} tokens")
        if tokens and int(table.max()) >= len(self._data[0]):
            raise BackendError(f"block {int(table.max())} was never written")
        return table

    def _grow(self, blocks: int) -> None:
        allocated = len(self._data[0])
        if blocks > self.num_blocks:
            raise BackendError(f"block {blocks - 1} is outside the cache of {self.num_blocks} blocks")
        if blocks > allocated:
            self._resize(min(self.num_blocks, max(blocks, 2 * allocated)))

    def _resize(self, blocks: int) -> None:
        for tensors in (self._data, self._scales):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_zeros((blocks, *old.shape[1:]))
                common = min(blocks, len(old))
                tensors[i][:common] = old[:common]


def _angle_table(inv_freq: np.ndarray, position: int, count: int, delta: int, device: torch.device) -> torch.Tensor:
    """cos and sin, float32 [count, rot], of the angles between positions position + t and position + t + delta: RoPE's are
    float32 products, and their differences are taken in double, so that rotations add up to the final position's angle."""
    positions = torch.arange(position, position + count, device=device, dtype=torch.int64)
    frequencies = torch.from_numpy(inv_freq).to(device)
    old, new = ((at[:, None].float() * frequencies).double() for at in (positions, positions + delta))
    return torch.cat(((new - old).cos(), (new - old).sin()), -1).float()
