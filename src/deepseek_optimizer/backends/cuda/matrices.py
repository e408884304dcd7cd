"""Packed matrices and stacks on the device: the tiles of `quant/`, byte for byte as they are in host memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...quant.base import TILE_COLS, TILE_ROWS
from ...quant.packed import PackedMatrix, PackedStack


@dataclass(frozen=True)
class TileLayout:
    """How a format's tiles are laid out.

    Attributes:
        words: words of a row in a tile.
        scaled: whether each row of a tile has an fp16 scale.
        narrow: whether products on tensor cores read rows and weights as bf16; otherwise everything is fp32.
    """

    words: int
    scaled: bool
    narrow: bool

    @property
    def per_word(self) -> int:
        """Columns in a word."""
        return TILE_COLS // self.words

    @property
    def tile_words(self) -> int:
        """Words of a whole tile, with its scales."""
        return self.words * TILE_ROWS + (TILE_ROWS // 2 if self.scaled else 0)


LAYOUTS = {
    "fp32": TileLayout(32, scaled=False, narrow=False),
    "bf16": TileLayout(16, scaled=False, narrow=True),
    "int8": TileLayout(8, scaled=True, narrow=True),
    "int4": TileLayout(4, scaled=True, narrow=True),
}


class DeviceTiles:
    """Packed tiles on the device.

    Attributes:
        rows, cols: size of a matrix.
        words: the tiles, int32 [.., ceil(rows/16), groups, tile_words].
        halves: the same memory as fp16, for scales.
        groups: tiles in a row of tiles, ceil(cols/32).
    """

    def __init__(self, format_name: str, rows: int, cols: int, words: torch.Tensor) -> None:
        self.format, self.rows, self.cols, self.words = format_name, rows, cols, words
        self.layout = LAYOUTS[format_name]
        self.halves = words.view(torch.float16)
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
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "FORMAT": self.format,
            "WORDS": self.layout.words,
            "PER_WORD": self.layout.per_word,
            "TILE_WORDS": self.layout.tile_words,
            "SCALED": self.layout.scaled,
        }


class DeviceMatrix(DeviceTiles):
    """A packed matrix [rows, cols] on the device.

    Args:
        matrix: in a format of LAYOUTS, its columns in the model's order.
        device: where its tiles are copied to, unless they are there.
    """

    def __init__(self, matrix: PackedMatrix, device: torch.device) -> None:
        super().__init__(matrix.format, matrix.rows, matrix.cols, _words(matrix.data, device))

    def part(self, begin: int, end: int) -> DeviceMatrix:
        """Rows [begin, end) as a view; `begin` is a multiple of 16."""
        part = object.__new__(DeviceMatrix)
        words = self.words[begin // TILE_ROWS : -(-end // TILE_ROWS)]
        DeviceTiles.__init__(part, self.format, end - begin, self.cols, words)
        return part


class DeviceStack(DeviceTiles):
    """Packed matrices of one size on the device, such as those of all experts.

    Args:
        stack: in a format of LAYOUTS.
        device: where its tiles are copied to, unless they are there.
    """

    def __init__(self, stack: PackedStack, device: torch.device) -> None:
        super().__init__(stack.format, stack.rows, stack.cols, _words(stack.data, device))

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
