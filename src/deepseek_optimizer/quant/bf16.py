"""bf16: rounded to nearest even, stored in pairs of columns (the order that AMX and VDPBF16PS read)."""

from __future__ import annotations

from typing import ClassVar

import torch

from .tiles import pack_panels, unpack_panels


class Bf16:
    """1024 bytes per tile: bf16 [16 k/2][16 r][2]. Lossless for bfloat16 weights."""

    name: ClassVar[str] = "bf16"
    code: ClassVar[int] = 1
    tile_bytes: ClassVar[int] = 1024
    bits: ClassVar[float] = 16.0
    activation: ClassVar[str] = "bf16"

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), 1024]."""
        return pack_panels(weight, Bf16.tile_bytes, _encode)

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32 and bfloat16."""
        return unpack_panels(packed, rows, cols, dtype, lambda words, _: words.view(torch.bfloat16), words=16)

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half a unit in the last place of 8 significant bits; 2^-134 where bf16 is subnormal."""
        return (weight.float().abs() * 2.0**-8).clamp_min(2.0**-134)


def _encode(panel: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    return panel.to(torch.bfloat16).view(torch.int32).view(panel.shape[0], -1, 16), ()
