"""Packed matrices and stacks on the device: the tiles of `quant/`, byte for byte as they are in host memory and on disk."""

from __future__ import annotations

import torch

from ...quant.base import TILE_ROWS
from ...quant.packed import PackedMatrix, PackedStack
from .alternative import Chosen, ProductShape
from .division import DEFAULT
from .layouts import CODED, LAYOUTS


class DeviceTiles:
    """Packed tiles on the device.

    Attributes:
        rows, cols: size of a matrix.
        words: the tiles, int32 [.., ceil(rows/16), groups, tile_words].
        layout: how kernels read them.
        groups: tiles in a row of tiles, ceil(cols/32).
        division: how products with them are divided.
        alternatives: what may take the place of this backend's own products of many rows, of matrices.
        first: of a part of a matrix, the row of the matrix that it begins with.
    """

    division = DEFAULT
    alternatives: tuple[Chosen, ...] = ()
    first = 0

    def __init__(self, format_name: str, rows: int, cols: int, words: torch.Tensor, coded: bool = False) -> None:
        self.format, self.rows, self.cols, self.words = format_name, rows, cols, words
        self.layout = CODED if coded and format_name == "fp8" else LAYOUTS[format_name]
        self.groups = words.shape[-2]

    @property
    def tile_rows(self) -> int:
        """Rows of tiles of a matrix."""
        return self.words.shape[-3]

    @property
    def row_words(self) -> int:
        """Words of a row."""
        return self.groups * self.layout.words

    @property
    def shape_of_product(self) -> ProductShape:
        """What decides which alternatives fit."""
        return ProductShape(self.format, self.layout.coded, self.first, self.rows, self.cols)


class DeviceMatrix(DeviceTiles):
    """A packed matrix [rows, cols] on the device.

    Args:
        matrix: in a format of LAYOUTS, its columns in the model's order.
        device: where its tiles are copied to, unless they are there.
        coded: whether products round rows to E4M3, if it is in FP8 (`TileLayout.coded`).
    """

    def __init__(self, matrix: PackedMatrix, device: torch.device, coded: bool = False) -> None:
        super().__init__(matrix.format, matrix.rows, matrix.cols, _words(matrix.data, device), coded)

    def part(self, begin: int, end: int) -> DeviceMatrix:
        """Rows [begin, end) as a view; `begin` is a multiple of 16."""
        part = object.__new__(DeviceMatrix)
        words = self.words[begin // TILE_ROWS : -(-end // TILE_ROWS)]
        DeviceTiles.__init__(part, self.format, end - begin, self.cols, words, self.layout.coded)
        part.division, part.alternatives, part.first = self.division, self.alternatives, self.first + begin
        return part


class DeviceStack(DeviceTiles):
    """Packed matrices of one size on the device, such as those of all experts.

    Args:
        stack: in a format of LAYOUTS.
        device, coded: as of `DeviceMatrix`.
    """

    def __init__(self, stack: PackedStack, device: torch.device, coded: bool = False) -> None:
        super().__init__(stack.format, stack.rows, stack.cols, _words(stack.data, device), coded)

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.words.shape[0]

    @property
    def matrix_words(self) -> int:
        """Words between two matrices."""
        return self.words.stride(0)


def _words(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    return data.detach().to(device).contiguous().view(torch.int32)
