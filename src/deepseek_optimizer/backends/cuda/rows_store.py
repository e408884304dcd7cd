"""The paged cache of compressed attention on the device: rows of several kinds."""

from __future__ import annotations

import torch

from ...graph.ir import RowsSpec
from ..base import BLOCK_TOKENS, Int32
from ..reference.rows_store import RowsOfBlocks, places_of, rows_block_bytes
from .store import KV_DTYPES, DeviceBlocks


class CudaRowsStore(DeviceBlocks):
    """Implements `KvStore`: a row of elements per block, [blocks, block_elements].

    In a block, the kinds of a group follow each other as in the reference's store, each with the rows of 32 tokens: row t % 32
    // every is that of the tokens that end with token t.

    Args:
        spec: the model's cache.
        kv_dtype: "fp32" or "bf16", of all kinds.
        num_blocks: capacity in blocks of 32 tokens.
    """

    def __init__(self, spec: RowsSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        super().__init__(*row_offsets(spec, kv_dtype), kv_dtype, num_blocks, device)
        self.spec, self._kinds = spec, RowsOfBlocks(spec, kv_dtype)

    def group_of(self, layer: int) -> int:
        return self.spec.group_of(layer)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, None]:
        every, table = self.spec.rows[layer].every, self._table(block_table, tokens)
        last = torch.arange(tokens // every, device=table.device, dtype=torch.int64) * every + every - 1
        at = table[last // BLOCK_TOKENS], last % BLOCK_TOKENS // every
        return self._kinds.read(self.data.view(torch.uint8), layer, at), None


def row_offsets(spec: RowsSpec, kv_dtype: str) -> tuple[list[int], int]:
    """Where each kind begins in the blocks of its group, and the length of a block, in elements."""
    size = KV_DTYPES[kv_dtype].itemsize
    return [place.at // size for place in places_of(spec, kv_dtype)], rows_block_bytes(spec, kv_dtype) // size
