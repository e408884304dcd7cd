"""A packed matrix: bytes, format and shape together."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedMatrix:
    """W[rows, cols] in format `format`. `data`: uint8 [ceil(rows/16), ceil(cols/32), tile_bytes], see `quant/base.py`."""

    format: str
    rows: int
    cols: int
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.data.numel()
