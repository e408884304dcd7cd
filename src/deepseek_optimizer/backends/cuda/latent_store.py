"""The paged cache of latents on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...graph.ir import LatentSpec
from ...graph.rope_rotation import KeyRotation
from ..base import BLOCK_TOKENS, Int32
from ..reference.ops import rope
from ..reference.scaled_rows import dequantized_groups, groups_of
from .store import CODES, DeviceBlocks

_KEY_BYTES, _SCALE_BYTES = 2, 4  # beside codes: keys are bf16


@dataclass(frozen=True)
class LatentLayout:
    """Where a block has what of a layer, in elements from the layer's begin: bytes with codes, otherwise floats.

    Attributes:
        width: elements between the latents of two tokens.
        keys, scales, index: begin of the rotated keys, of the scales of codes, and of the indexer's keys.
        end: of the layer.
    """

    width: int
    keys: int
    scales: int
    index: int
    end: int

    @classmethod
    def of(cls, spec: LatentSpec, kv_dtype: str) -> LatentLayout:
        if kv_dtype not in CODES:
            width = spec.rank + spec.rope
            return cls(width, spec.rank, 0, BLOCK_TOKENS * width, BLOCK_TOKENS * (width + spec.index))
        keys = BLOCK_TOKENS * spec.rank
        scales = keys + BLOCK_TOKENS * spec.rope * _KEY_BYTES
        index = scales + BLOCK_TOKENS * groups_of(spec.rank) * _SCALE_BYTES
        return cls(spec.rank, keys, scales, index, index + BLOCK_TOKENS * spec.index * _KEY_BYTES)


class CudaLatentStore(DeviceBlocks):
    """Implements `KvStore`: a row of elements per block, [blocks, block_elements].

    In a block, the layers follow each other, each with the rows of 32 tokens, a latent of `rank` elements and the rotated key,
    and then their keys of the indexer, if there is one. In int8 and fp8, elements are bytes: first the codes of the latents
    [32, rank], then the rotated keys in bf16 [32, rope], the scales of the codes, float32 [32, groups of 128 elements], and the
    indexer's keys in bf16, as the reference's store has them.

    Args:
        spec: the model's cache, without summaries.
        kv_dtype: a key of `KV_DTYPES`.
        num_blocks: capacity in blocks of 32 tokens.
    """

    def __init__(self, spec: LatentSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        offsets, elements = latent_offsets(spec, kv_dtype)
        super().__init__(offsets, elements, kv_dtype, num_blocks, device)
        self.spec, self._layout = spec, LatentLayout.of(spec, kv_dtype)
        self._codes = kv_dtype in CODES

    def group_of(self, layer: int) -> int:
        return 0

    @property
    def floats(self) -> torch.Tensor:
        """The cache as elements of the type that keys have."""
        return self.data.view(torch.bfloat16) if self._codes else self.data

    def index_offset(self, layer: int) -> int:
        """Where the indexer's keys of a layer begin in a block of `floats`."""
        return (self.offsets[layer] + self._layout.index) // (_KEY_BYTES if self._codes else 1)

    def _latents(self, layer: int) -> torch.Tensor:
        """A view of a layer's latents, or their codes, [blocks, 32, rank]."""
        return self._view(self.data, self.offsets[layer], self._layout.width)[..., : self.spec.rank]

    def _keys(self, layer: int) -> torch.Tensor:
        """A view of a layer's rotated keys, [blocks, 32, rope]."""
        if self._codes:
            return self._view(self.floats, (self.offsets[layer] + self._layout.keys) // _KEY_BYTES, self.spec.rope)
        return self._view(self.data, self.offsets[layer], self._layout.width)[..., self.spec.rank :]

    def _index_keys(self, layer: int) -> torch.Tensor:
        """A view of a layer's keys of the indexer, [blocks, 32, index]."""
        return self._view(self.floats, self.index_offset(layer), self.spec.index)

    def _values(self, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """The latents of a layer in these blocks, float32 [blocks, 32, rank]."""
        latents = self._latents(layer)[blocks]
        if not self._codes:
            return latents.float()
        begin, groups = (self.offsets[layer] + self._layout.scales) // _SCALE_BYTES, groups_of(self.spec.rank)
        return dequantized_groups(latents, self._view(self.data.view(torch.float32), begin, groups)[blocks], self.kv_dtype)

    @staticmethod
    def _view(data: torch.Tensor, begin: int, width: int) -> torch.Tensor:
        return data[:, begin : begin + BLOCK_TOKENS * width].unflatten(-1, (BLOCK_TOKENS, width))

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        index = self.spec.index
        if (rotation.index is None) != (index == 0):
            raise ValueError(f"rotation.index is {rotation.index}, but the cache's index keys have {index} elements")
        for layer in range(len(self.offsets)):
            parts = [(self._keys(layer), rotation.key)]
            if rotation.index is not None:
                parts.append((self._index_keys(layer), rotation.index))
            for keys, pairs in parts:
                rows = keys[blocks].float()
                yield keys, rope(rows.flatten(0, 1), angles, 1, pairs.interleaved, pairs.offset).view(rows.shape)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        blocks = self._table(block_table, tokens)[: -(-tokens // BLOCK_TOKENS)]
        rows = torch.cat((self._values(layer, blocks), self._keys(layer)[blocks].float()), -1)
        index = self._index_keys(layer)[blocks].float().flatten(0, 1)[:tokens].contiguous() if self.spec.index else None
        return rows.flatten(0, 1)[:tokens].contiguous(), index


def latent_offsets(spec: LatentSpec, kv_dtype: str) -> tuple[list[int], int]:
    """Where each layer begins in a block, and the length of a block, in elements; of codes, bytes."""
    elements = LatentLayout.of(spec, kv_dtype).end
    return [layer * elements for layer in range(spec.layers)], spec.layers * elements
