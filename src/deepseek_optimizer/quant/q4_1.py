"""q4_1: 4 bits with a scale and a minimum by groups of 32 columns (5 bits). ggml's Q4_1 is the same numbers."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import TILE_COLS
from .groups import grouped, join_nibbles, quantise, round_scale, scale_error, split_nibbles, to_words, ungroup
from .tiles import pack_panels, pad_to_tiles, unpack_panels


class Q4_1:
    """320 bytes a tile: nibbles as int4 holding q in [0, 15], fp16 scale[16], fp16 min[16]. W = scale * q + min."""

    name: ClassVar[str] = "q4_1"
    code: ClassVar[int] = 4
    tile_bytes: ClassVar[int] = 320
    bits: ClassVar[float] = 5.0
    activation: ClassVar[str] = "q16"

    @staticmethod
    def pack(weight: torch.Tensor) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), 320]."""
        tail = weight.shape[-1] % TILE_COLS
        return pack_panels(weight, Q4_1.tile_bytes, lambda panel: _encode(panel, tail))

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]: the product is exact in float32, the sum rounded once, as ggml does it."""
        return unpack_panels(packed, rows, cols, dtype, _decode, words=4, halves=2)

    @staticmethod
    def error_bound(weight: torch.Tensor) -> torch.Tensor:
        """Half a step, and the rounding of scale, minimum and sum."""
        groups = grouped(pad_to_tiles(weight))
        low, high = (x.unsqueeze(-1) for x in _range(groups, weight.shape[-1] % TILE_COLS))
        step = (high - low) / 15
        rounding = 15.5 * scale_error(step) + scale_error(low) + 2.0**-22 * (low.abs() + groups.abs())
        return ungroup(step / 2 + rounding, weight)


def _range(groups: torch.Tensor, tail: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest of each group, [n, g, 32] -> 2 x [n, g]. `tail`: real columns of the last group, 0 for all of them."""
    low, high = groups.amin(-1), groups.amax(-1)
    if tail:
        low[:, -1], high[:, -1] = groups[:, -1, :tail].amin(-1), groups[:, -1, :tail].amax(-1)
    return low, high


def _encode(panel: torch.Tensor, tail: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    groups = grouped(panel)
    low, high = _range(groups, tail)
    scale, minimum = round_scale((high - low) / 15), round_scale(low)
    broken = ~(scale.isfinite() & minimum.isfinite())
    scale.masked_fill_(broken, torch.nan)
    minimum.masked_fill_(broken, 0.0)
    q = quantise(groups - minimum.float().unsqueeze(-1), scale, 0, 15)
    if tail:
        q[:, -1, tail:] = 0
    return join_nibbles(to_words(q)), (scale, minimum)


def _decode(words: torch.Tensor, halves: tuple[torch.Tensor, ...]) -> torch.Tensor:
    scale, minimum = (h.float().unsqueeze(-1) for h in halves)
    return split_nibbles(words).float() * scale + minimum
