"""fp32: unquantized, in tiles."""

from __future__ import annotations

from typing import ClassVar

import torch

from .tiles import pack_panels, unpack_panels


class Fp32:
    """2048 bytes per tile: float [32 k][16 r]. Lossless for float32, bfloat16 and float16 weights."""

    name: ClassVar[str] = "fp32"
    code: ClassVar[int] = 0
    tile_bytes: ClassVar[int] = 2048
    bits: ClassVar[float] = 32.0
    activation: ClassVar[str] = "f32"

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), 2048]."""
        return pack_panels(weight, Fp32.tile_bytes, _encode)

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]."""
        return unpack_panels(packed, rows, cols, dtype, lambda words, _: words.view(torch.float32), words=32)

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Zero."""
        return torch.zeros_like(weight, dtype=torch.float32)


def _encode(panel: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    return panel.to(torch.float32).view(torch.int32).view(panel.shape[0], -1, 32), ()
