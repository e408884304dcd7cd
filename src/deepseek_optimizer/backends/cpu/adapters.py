"""Low-rank adapters in the layout of the native kernels: tiles of 16 rows, in bf16 in pairs of columns."""

from __future__ import annotations

import ctypes as C
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from ...errors import NotEnoughMemoryError
from ...graph.ir import AdapterSite
from ...quant.base import TILE_ROWS
from ...system.pages import private_pages
from .buffers import address
from .native import FORMATS, Handle, check, library
from .structs import Site, Weight

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Pair = tuple[torch.Tensor, torch.Tensor]  # as `AdapterSite.pair_shapes`


class CpuAdapters:
    """Implements `AdapterStore`.

    Args:
        sites: the graph's adapter sites.
        slots, rank, dtype: as for `Backend.new_adapters`.
    """

    def __init__(self, sites: Sequence[AdapterSite], slots: int, rank: int, dtype: str) -> None:
        self.slots, self._sites, self._format, self._dtype = slots, sites, FORMATS[dtype], _DTYPES[dtype]
        self.lib = library()
        shapes = (Site * len(sites))(*(Site(site.outputs, site.inputs, site.heads) for site in sites))
        create, destroy = self.lib.dso_adapters_create, self.lib.dso_adapters_destroy
        self.handle = Handle(create, destroy, shapes, len(sites), slots, rank)
        self._held: list[dict[int, Pair]] = [{} for _ in range(slots)]  # by slot and site: the tiles that the library reads

    def adapter_bytes(self, ranks: Mapping[int, int]) -> int:
        return self._bytes(shape for site, r in ranks.items() for shape in self._sites[site].pair_shapes(r))

    def _bytes(self, shapes: Iterable[tuple[int, ...]]) -> int:
        """Size of matrices of these shapes as tiles."""
        elements = sum(math.prod((*heads, _padded(rows), self._columns(cols))) for *heads, rows, cols in shapes)
        return elements * self._dtype.itemsize

    def load(self, slot: int, pairs: Mapping[int, Pair]) -> None:
        held = self._held[slot]
        # One mapping with huge pages: a step reads all matrices of its adapters, and in small pages the addresses of 16 of them
        # exceed what the processor remembers. With SmolLM2-135M, rank 16, this took an eighth of the adapters' part of a step.
        size = max(self._dtype.itemsize, self._bytes(tuple(matrix.shape) for pair in pairs.values() for matrix in pair))
        try:
            free = torch.frombuffer(private_pages(size), dtype=self._dtype)
        except OSError as error:
            raise NotEnoughMemoryError("a LoRA adapter", size, None, "unload another adapter, or reduce the rank") from error
        try:
            for site, (down, up) in pairs.items():
                tiles = []
                for matrix in (down, up):
                    tiles.append(self._tiles(matrix, free))
                    free = free[tiles[-1].numel() :]
                held[site] = tiles[0], tiles[1]
                matrices = (self._matrix(m, tiles) for m, tiles in zip((down, up), held[site], strict=True))
                check(self.lib.dso_adapters_set(self.handle, slot, site, *(C.byref(matrix) for matrix in matrices)))
        except BaseException:
            self.clear(slot)
            raise

    def clear(self, slot: int) -> None:
        for site in self._held[slot]:
            check(self.lib.dso_adapters_set(self.handle, slot, site, None, None))
        self._held[slot].clear()

    def _tiles(self, matrix: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """A matrix [rows, cols], or one for each head, as the library reads it: [ceil(rows / 16), cols, 16, 1], in bf16
        [ceil(rows / 16), ceil(cols / 2), 16, 2]; at the start of `free`."""
        *heads, rows, cols = matrix.shape
        whole = torch.zeros(*heads, _padded(rows), self._columns(cols), dtype=self._dtype, device="cpu")
        whole[..., :rows, :cols] = matrix
        tiles = whole.unflatten(-1, (-1, self._together)).unflatten(-3, (-1, TILE_ROWS)).transpose(-3, -2)
        return free[: tiles.numel()].view(tiles.shape).copy_(tiles)

    @property
    def _together(self) -> int:
        """Number of columns that are stored together."""
        return 2 if self._dtype == torch.bfloat16 else 1

    def _columns(self, cols: int) -> int:
        """Number of stored columns."""
        return -(-cols // self._together) * self._together

    def _matrix(self, matrix: torch.Tensor, tiles: torch.Tensor) -> Weight:
        *heads, rows, cols = matrix.shape
        shape = (*heads, _padded(rows) // TILE_ROWS, self._columns(cols) // self._together, TILE_ROWS, self._together)
        place = address(tiles, "an adapter's matrix", self._dtype, shape)
        return Weight(self._format, rows, cols, math.prod(heads) if heads else 0, place, tiles.numel() * self._dtype.itemsize)


def _padded(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS
