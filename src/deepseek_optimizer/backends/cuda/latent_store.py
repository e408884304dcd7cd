"""The paged cache of latents on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...graph.ir import LatentSpec
from ...graph.rope_rotation import KeyRotation
from ..base import BLOCK_TOKENS, Int32
from ..reference.ops import rope
from .store import DeviceBlocks


class CudaLatentStore(DeviceBlocks):
    """Implements `KvStore`: a row of elements per block, [blocks, block_elements].

    In a block, the layers follow each other, each with the rows of 32 tokens, a latent of `rank` elements and the rotated key,
    and then their keys of the indexer, if there is one.

    Args:
        spec: the model's cache, without summaries.
        kv_dtype: "fp32" or "bf16".
        num_blocks: capacity in blocks of 32 tokens.
    """

    def __init__(self, spec: LatentSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        offsets, elements = latent_offsets(spec)
        super().__init__(offsets, elements, kv_dtype, num_blocks, device)
        self._rank, self._width, self._index = spec.rank, spec.rank + spec.rope, spec.index

    def group_of(self, layer: int) -> int:
        return 0

    def index_offset(self, layer: int) -> int:
        """Where the indexer's keys of a layer begin in a block."""
        return self.offsets[layer] + BLOCK_TOKENS * self._width

    def _rows(self, layer: int) -> torch.Tensor:
        """A view of a layer's latents and rotated keys, [blocks, 32, rank + rope]."""
        return self._view(self.offsets[layer], self._width)

    def _index_keys(self, layer: int) -> torch.Tensor:
        """A view of a layer's keys of the indexer, [blocks, 32, index]."""
        return self._view(self.index_offset(layer), self._index)

    def _view(self, begin: int, width: int) -> torch.Tensor:
        return self.data[:, begin : begin + BLOCK_TOKENS * width].unflatten(-1, (BLOCK_TOKENS, width))

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if (rotation.index is None) != (self._index == 0):
            raise ValueError(f"rotation.index is {rotation.index}, but the cache's index keys have {self._index} elements")
        for layer in range(len(self.offsets)):
            parts = [(self._rows(layer)[..., self._rank :], rotation.key)]
            if rotation.index is not None:
                parts.append((self._index_keys(layer), rotation.index))
            for keys, pairs in parts:
                rows = keys[blocks].float()
                yield keys, rope(rows.flatten(0, 1), angles, 1, pairs.interleaved, pairs.offset).view(rows.shape)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        blocks = self._table(block_table, tokens)[: -(-tokens // BLOCK_TOKENS)]
        parts = (self._rows(layer), self._index_keys(layer)) if self._index else (self._rows(layer),)
        rows, *index = (part[blocks].float().flatten(0, 1)[:tokens].contiguous() for part in parts)
        return rows, index[0] if index else None


def latent_offsets(spec: LatentSpec) -> tuple[list[int], int]:
    """Where each layer begins in a block, and the length of a block, in elements."""
    elements = BLOCK_TOKENS * (spec.rank + spec.rope + spec.index)
    return [layer * elements for layer in range(spec.layers)], spec.layers * elements
