"""Paged K and V as torch tensors [blocks, 32, kv_heads, head_dim], one of each a layer."""

from __future__ import annotations

import torch

from ...errors import BackendError
from ...graph.ir import CacheSpec
from ..base import BLOCK_TOKENS, Int32

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def store_block_bytes(spec: CacheSpec, kv_dtype: str) -> int:
    """Bytes of one block of all layers; int8 has a float32 scale for each token and head."""
    row = spec.head_dim * _dtype(kv_dtype).itemsize + (4 if kv_dtype == "int8" else 0)
    return 2 * spec.layers * BLOCK_TOKENS * spec.kv_heads * row


def _dtype(kv_dtype: str) -> torch.dtype:
    try:
        return DTYPES[kv_dtype]
    except KeyError:
        raise BackendError(f"unknown KV cache dtype {kv_dtype!r}; known: {', '.join(DTYPES)}") from None


class TorchStore:
    """Implements `KvStore`. Memory grows with the highest block written.

    int8: scale = max|x| / 127 of a token's head, q = rint(x / scale).
    """

    def __init__(self, spec: CacheSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        self.spec, self.kv_dtype, self.num_blocks = spec, kv_dtype, num_blocks
        self.block_bytes = store_block_bytes(spec, kv_dtype)
        shape = (0, BLOCK_TOKENS, spec.kv_heads, spec.head_dim)
        self._data = [torch.zeros(shape, dtype=_dtype(kv_dtype), device=device) for _ in range(2 * spec.layers)]
        self._scales = [torch.zeros(shape[:3], device=device) for _ in range(2 * spec.layers if kv_dtype == "int8" else 0)]

    def write(self, layer: int, table: torch.Tensor, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts K and V, float [n, kv_heads, head_dim], at tokens [start, start + n) of a sequence.

        Args:
            table: int64 [blocks], the sequence's blocks.
        """
        tokens = torch.arange(start, start + len(key), device=table.device)
        blocks, places = table[tokens // BLOCK_TOKENS], tokens % BLOCK_TOKENS
        self._grow(int(blocks.max()) + 1)
        for i, rows in ((2 * layer, key), (2 * layer + 1, value)):
            if self.kv_dtype == "int8":
                scale = rows.float().abs().amax(-1) / 127
                self._scales[i][blocks, places] = scale
                rows = torch.round(rows.float() / torch.where(scale == 0, 1.0, scale)[..., None])
            self._data[i][blocks, places] = rows.to(self._data[i].dtype)

    def gather(self, layer: int, table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a sequence's first `tokens` tokens, float32 [tokens, kv_heads, head_dim]."""
        blocks = table[: -(-tokens // BLOCK_TOKENS)]
        both = []
        for i in (2 * layer, 2 * layer + 1):
            rows = self._data[i][blocks].flatten(0, 1)[:tokens].float()
            if self.kv_dtype == "int8":
                rows = rows * self._scales[i][blocks].flatten(0, 1)[:tokens, :, None]
            both.append(rows)
        return both[0], both[1]

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.from_numpy(block_table).to(self._data[0].device, torch.int64)
        if len(table) * BLOCK_TOKENS < tokens:
            raise BackendError(f"a table of {len(table)} blocks does not hold {tokens} tokens")
        if tokens and int(table.max()) >= len(self._data[0]):
            raise BackendError(f"block {int(table.max())} was never written")
        key, value = self.gather(layer, table, tokens)
        return key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()

    def copy_block(self, source: int, target: int) -> None:
        self._grow(max(source, target) + 1)
        for tensor in (*self._data, *self._scales):
            tensor[target] = tensor[source]

    def release(self, from_block: int) -> None:
        self._resize(min(from_block, len(self._data[0])))

    def _grow(self, blocks: int) -> None:
        have = len(self._data[0])
        if blocks > self.num_blocks:
            raise BackendError(f"block {blocks - 1} is outside the cache of {self.num_blocks} blocks")
        if blocks > have:
            self._resize(min(self.num_blocks, max(blocks, 2 * have)))

    def _resize(self, blocks: int) -> None:
        for tensors in (self._data, self._scales):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_zeros((blocks, *old.shape[1:]))
                kept = min(blocks, len(old))
                tensors[i][:kept] = old[:kept]
