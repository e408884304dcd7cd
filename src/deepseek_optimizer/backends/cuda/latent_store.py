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

    In a block, the layers follow each other, each with the rows of 32 tokens: a latent of `rank` elements, then the rotated
    key.

    Args:
        spec: the model's cache, without an indexer's keys and without summaries.
        kv_dtype: "fp32" or "bf16".
        num_blocks: capacity in blocks of 32 tokens.
    """

    def __init__(self, spec: LatentSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        offsets, elements = latent_offsets(spec)
        super().__init__(offsets, elements, kv_dtype, num_blocks, device)
        self._rank, self._width = spec.rank, spec.rank + spec.rope

    def group_of(self, layer: int) -> int:
        return 0

    def _rows(self, layer: int) -> torch.Tensor:
        """A view of a layer, [blocks, 32, rank + rope]."""
        begin = self.offsets[layer]
        return self.data[:, begin : begin + BLOCK_TOKENS * self._width].unflatten(-1, (BLOCK_TOKENS, self._width))

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for layer in range(len(self.offsets)):
            keys = self._rows(layer)[..., self._rank :]
            rows = keys[blocks].float()
            turned = rope(rows.flatten(0, 1), angles, 1, rotation.key.interleaved, rotation.key.offset)
            yield keys, turned.view(rows.shape)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, None]:
        blocks = self._table(block_table, tokens)[: -(-tokens // BLOCK_TOKENS)]
        return self._rows(layer)[blocks].float().flatten(0, 1)[:tokens].contiguous(), None


def latent_offsets(spec: LatentSpec) -> tuple[list[int], int]:
    """Where each layer begins in a block, and the length of a block, in elements."""
    elements = BLOCK_TOKENS * (spec.rank + spec.rope)
    return [layer * elements for layer in range(spec.layers)], spec.layers * elements
