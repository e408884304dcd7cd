"""The paged cache of keys and values on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import BackendError
from ...graph.ir import CacheSpec
from ...graph.rope_rotation import KeyRotation
from ..base import BLOCK_TOKENS, Int32
from ..reference.block_tensors import BlockTensors
from ..reference.ops import rope
from ..reference.scaled_rows import dequantized, quantized
from .memory import memory_errors
from .states import DeviceStates

KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.uint8}
CODES = ("int8", "fp8")  # with scales, see `reference/scaled_rows.py`
_SCALE_BYTES = 4


def layer_offsets(spec: CacheSpec, kv_dtype: str) -> tuple[list[int], int]:
    """Where each layer begins in the blocks of its group, and the length of a block, in elements: that of the largest group.
    The scales of codes, which follow a layer's, count as bytes, as do the summaries of its keys in bf16 after them."""
    ends, offsets = [0] * spec.groups, []
    for layer in range(spec.layers):
        group, scales = spec.group_of(layer), 2 * spec.heads_of(layer)[0] if kv_dtype in CODES else 0
        offsets.append(ends[group])
        ends[group] += BLOCK_TOKENS * (spec.elements_of(layer) + _SCALE_BYTES * scales)
        if spec.summaries:
            ends[group] += spec.elements_of(layer) * (2 if kv_dtype in CODES else 1)
    return offsets, max(ends)


class DeviceBlocks(BlockTensors):
    """Blocks as rows of elements, [blocks, block_elements]. All memory is allocated at the first write, since a larger copy
    would not fit beside it on a card that is nearly full; later, only `release` frees some.

    Args:
        offsets: where each layer begins in a block.
        elements: of a block.
        kv_dtype: a key of `KV_DTYPES`.
        num_blocks: capacity in blocks of 32 tokens.

    Attributes:
        scratch: a further block, which no sequence has: padding rows of a step write to it.
    """

    def __init__(self, offsets: list[int], elements: int, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        dtype = KV_DTYPES[kv_dtype]
        self.offsets = offsets
        super().__init__(elements * dtype.itemsize, kv_dtype, num_blocks)
        self.scratch = num_blocks
        self._data = [torch.zeros((0, elements), dtype=dtype, device=device)]

    def group_of(self, layer: int) -> int:
        """The group that a layer is in."""
        raise NotImplementedError

    @property
    def data(self) -> torch.Tensor:
        """The cache, [blocks, block_elements]; no blocks before the first write."""
        return self._data[0]

    @property
    def address(self) -> tuple[int, ...]:
        """Of the memory of blocks and of recurrent states."""
        states = (self.states.data.data_ptr(),) if isinstance(self.states, DeviceStates) else ()
        return (self.data.data_ptr(), *states)

    @property
    def held_blocks(self) -> int:
        return min(len(self.data), self.num_blocks)  # without the scratch block

    @property
    def held_states(self) -> int:
        return len(self.states.data) if isinstance(self.states, DeviceStates) else 0

    def ensure(self, blocks: int) -> None:
        """Allocates memory, before a step that uses blocks < `blocks`."""
        self._grow(blocks)

    def release(self, from_block: int) -> None:
        """Frees the memory if no block is left; otherwise all of it stays, at its address."""
        if from_block == 0:
            self._resize(0)

    def _grow(self, blocks: int) -> None:
        if blocks > self.num_blocks:
            raise BackendError(f"block {blocks - 1} is outside the cache of {self.num_blocks} blocks")
        if blocks > len(self.data):
            size = (self.num_blocks + 1) * self.block_bytes
            with memory_errors(f"the KV cache of {size / 1e9:.2f} GB on {self.data.device}", "set a smaller kv_cache_memory"):
                self._resize(self.num_blocks + 1)


class CudaStore(DeviceBlocks):
    """Implements `KvStore` for keys and values.

    In a block, the layers of a group follow each other: the keys [kv_heads, 32, head_dim], then the values likewise. So the 32
    keys of a head are consecutive, which is what one load of attention reads. In int8 and fp8, their scales follow,
    float32 [2, kv_heads, 32], of each key and value as in the reference's store. At last, with summaries, those of the block's
    keys, [2, kv_heads, head_dim]: their largest elements, then their smallest; in bf16 beside codes.

    Args:
        spec: the model's cache, without copies.
    """

    def __init__(self, spec: CacheSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        super().__init__(*layer_offsets(spec, kv_dtype), kv_dtype, num_blocks, device)
        self.spec, self._codes = spec, kv_dtype in CODES

    def group_of(self, layer: int) -> int:
        return self.spec.group_of(layer)

    def _part(self, layer: int, value: bool) -> torch.Tensor:
        """A view of the keys or values of a layer, [blocks, kv_heads, 32, head_dim]."""
        kv_heads, head_dim = self.spec.heads_of(layer)
        size = kv_heads * BLOCK_TOKENS * head_dim
        begin = self.offsets[layer] + value * size
        return self.data[:, begin : begin + size].view(-1, kv_heads, BLOCK_TOKENS, head_dim)

    def _scales_of(self, layer: int, value: bool) -> torch.Tensor:
        """A view of their scales in a cache of codes, float32 [blocks, kv_heads, 32]."""
        kv_heads, head_dim = self.spec.heads_of(layer)
        count = kv_heads * BLOCK_TOKENS
        begin = self.offsets[layer] + count * (2 * head_dim + value * _SCALE_BYTES)
        return self.data[:, begin : begin + count * _SCALE_BYTES].view(torch.float32).view(-1, kv_heads, BLOCK_TOKENS)

    def _summaries_of(self, layer: int) -> torch.Tensor:
        """A view of the summaries of a layer's keys, [blocks, 2, kv_heads, head_dim]."""
        kv_heads, head_dim = self.spec.heads_of(layer)
        item = 2 if self._codes else 1
        scales = 2 * kv_heads * BLOCK_TOKENS * _SCALE_BYTES if self._codes else 0
        begin = self.offsets[layer] + BLOCK_TOKENS * self.spec.elements_of(layer) + scales
        part = self.data[:, begin : begin + 2 * kv_heads * head_dim * item]
        return (part.view(torch.bfloat16) if self._codes else part).view(-1, 2, kv_heads, head_dim)

    def _values(self, layer: int, value: bool, blocks: torch.Tensor) -> torch.Tensor:
        """The keys or values of a layer in these blocks, float32 [blocks, kv_heads, 32, head_dim]."""
        rows = self._part(layer, value)[blocks]
        return dequantized(rows, self._scales_of(layer, value)[blocks], self.kv_dtype) if self._codes else rows.float()

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """With torch's operations: windows slide rarely, and no step waits for a kernel of its own."""
        for layer in range(self.spec.layers):
            if self.spec.group_of(layer) == group:
                rows = self._values(layer, False, blocks).transpose(1, 2)
                turned = rope(
                    rows.flatten(0, 1).flatten(1), angles, rows.shape[2], rotation.key.interleaved, rotation.key.offset
                )
                new = turned.view(rows.shape).transpose(1, 2)
                stored = new.to(self.data.dtype).float()
                if self._codes:
                    new, scales = quantized(new, self.kv_dtype)
                    yield self._scales_of(layer, False), scales
                    stored = dequantized(new, scales, self.kv_dtype)
                yield self._part(layer, False), new
                if self.spec.summaries:
                    yield self._summaries_of(layer), torch.stack((stored.amax(2), stored.amin(2)), 1)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = self._table(block_table, tokens)[: -(-tokens // BLOCK_TOKENS)]
        key, value = (self._values(layer, part, blocks).transpose(0, 1).flatten(1, 2) for part in (False, True))
        return key[:, :tokens].contiguous(), value[:, :tokens].contiguous()
