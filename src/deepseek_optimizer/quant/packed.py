"""Packed matrices and stacks of matrices: data, format and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [rows, cols] in a weight format. `data`: uint8 [ceil(rows/16), ceil(cols/32), tile_bytes], see `base.py`."""

    format: str
    rows: int
    cols: int
    data: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def nbytes(self) -> int:
        return self.data.numel()


@dataclass(frozen=True)
class PackedStack:
    """`count` matrices of the same shape and format (experts, heads), each packed separately.

    `data`: uint8 [count, ceil(rows/16), ceil(cols/32), tile_bytes], contiguous.
    """

    format: str
    count: int
    rows: int
    cols: int
    data: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count, self.rows, self.cols

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def matrix(self, index: int) -> PackedMatrix:
        """Matrix `index` of the stack, as a view."""
        return PackedMatrix(self.format, self.rows, self.cols, self.data[index])


PackedWeight = PackedMatrix | PackedStack
