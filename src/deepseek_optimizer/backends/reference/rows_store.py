"""The cache of compressed attention in torch: rows of several kinds, in blocks that hold the kinds of one group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...graph.ir import CachedRows, RowsSpec
from . import int4_rows
from .scaled_rows import (
    LARGEST,
    LATENT_GROUP,
    SCALED,
    dequantized_groups,
    dtype_of,
    groups_of,
    packed_elements,
    quantized_groups,
    unquantized,
)

_ALIGNED = 64  # bytes between the beginnings of kinds in a block


@dataclass(frozen=True)
class Place:
    """Where a block holds the rows of a kind.

    Attributes:
        rows: the kind.
        dtype: of the elements as they are stored.
        packed: elements in one of that dtype.
        at, scales_at: first byte of elements [places, width / packed], and of scales [places, groups].
        groups: scales of a row; 0: elements have none.
    """

    rows: CachedRows
    dtype: torch.dtype
    packed: int
    at: int
    scales_at: int
    groups: int

    @property
    def end(self) -> int:
        return self.scales_at + -(-4 * self.rows.places * self.groups // _ALIGNED) * _ALIGNED

    def elements(self, blocks: torch.Tensor) -> torch.Tensor:
        """uint8 [blocks, bytes] -> a view [blocks, places, width / packed]."""
        places, width = self.rows.places, self.rows.width // self.packed
        part = blocks[:, self.at : self.at + places * width * self.dtype.itemsize]
        return part.view(self.dtype).unflatten(-1, (places, width))

    def scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """A view float32 [blocks, places, groups]."""
        part = blocks[:, self.scales_at : self.scales_at + 4 * self.rows.places * self.groups]
        return part.view(torch.float32).unflatten(-1, (self.rows.places, self.groups))


def places_of(spec: RowsSpec, kv_dtype: str) -> list[Place]:
    """The place of each kind in the blocks of its group."""
    ends, places = [0] * spec.groups, []
    for kind, rows in enumerate(spec.rows):
        group, dtype = spec.group_of(kind), dtype_of(kv_dtype)
        packed = packed_elements(kv_dtype) if rows.rounded else 1
        groups = groups_of(rows.width) if rows.rounded and kv_dtype in SCALED else 0
        dtype = dtype if rows.rounded else unquantized(dtype)
        size = rows.places * rows.width * dtype.itemsize // packed
        place = Place(rows, dtype, packed, ends[group], ends[group] + -(-size // _ALIGNED) * _ALIGNED, groups)
        places.append(place)
        ends[group] = place.end
    return places


def rows_block_bytes(spec: RowsSpec, kv_dtype: str) -> int:
    """Bytes of one block of the largest group."""
    return max(place.end for place in places_of(spec, kv_dtype))


class RowsOfBlocks:
    """The rows in a cache's blocks, uint8 [blocks, bytes], which the caller holds."""

    def __init__(self, spec: RowsSpec, kv_dtype: str) -> None:
        self.spec, self.kv_dtype = spec, kv_dtype
        self.places = places_of(spec, kv_dtype)

    def write(self, blocks: torch.Tensor, kind: int, at: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> None:
        """Stores rows, float [n, width], at (blocks, places within them)."""
        place = self.places[kind]
        if place.groups and self.kv_dtype in LARGEST:
            rows, place.scales(blocks)[at] = quantized_groups(rows.float(), self.kv_dtype)
        elif place.groups:
            codes = [int4_rows.quantized(group) for group in rows.float().split(LATENT_GROUP, -1)]
            rows = torch.cat([c for c, _ in codes], -1)
            place.scales(blocks)[at] = torch.stack([s for _, s in codes], -1)
        place.elements(blocks)[at] = rows.to(place.dtype)

    def read(self, blocks: torch.Tensor, kind: int, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rows at (blocks, places within them), float32 [n, width]."""
        place = self.places[kind]
        rows = place.elements(blocks)[at]
        if not place.groups:
            return rows.float()
        scales = place.scales(blocks)[at]
        if self.kv_dtype in LARGEST:
            return dequantized_groups(rows, scales, self.kv_dtype)
        groups = zip(rows.split(LATENT_GROUP // 2, -1), scales.unbind(-1), strict=True)
        return torch.cat([int4_rows.dequantized(codes, scale) for codes, scale in groups], -1)
