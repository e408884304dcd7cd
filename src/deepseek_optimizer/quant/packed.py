"""Packed matrices and stacks of matrices: data, format and shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class ColumnOrder:
    """Columns that are stored in another order than the model has them (`checkpoint/gguf_delta.py`).

    The columns are `groups` x `each` runs of one length. First the first run of every group is stored, then the second of every
    group, and so on.
    """

    groups: int
    each: int

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., cols], with the columns in the stored order."""
        return x.unflatten(-1, (self.groups, self.each, -1)).transpose(-3, -2).flatten(-3)

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `stored`."""
        return ColumnOrder(self.each, self.groups).stored(x)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [rows, cols] in a weight format. `data`: uint8 [ceil(rows/16), ceil(cols/32), tile_bytes], see `base.py`.

    `order`: of the columns in `data`; None: as in the model. Products and `unpack` take and return them in the model's order.
    """

    format: str
    rows: int
    cols: int
    data: torch.Tensor
    order: ColumnOrder | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def as_stored(self) -> PackedMatrix:
        """The matrix whose columns are those of `data` in order."""
        return replace(self, order=None)


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
