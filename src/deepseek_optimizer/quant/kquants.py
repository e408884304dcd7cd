"""Formats that hold the values of ggml's K-quants, IQ4, Q5_0, Q5_1 and MXFP4 exactly.

Their tiles are described in `blocks.py` and `native/include/dso.h`. Sizes are at most 4% above ggml's, which packs 6-bit scales
tightly.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .blocks import IQ4_VALUES, MXFP4_VALUES, BlockFormat


class Q2K(BlockFormat):
    """q2_k: 2-bit codes; per 16 columns a 4-bit scale (low) and minimum (high) in one byte."""

    name: ClassVar[str] = "q2_k"
    code: ClassVar[int] = 6
    tile_bytes: ClassVar[int] = 168
    bits: ClassVar[float] = 2.625
    low, group, has_min, most, searched = 2, 16, True, 15, True

    @classmethod
    def _join(cls, parts: list[torch.Tensor], across: int) -> torch.Tensor:
        scale, minimum = (part.view(torch.uint8) for part in parts)
        return (scale | (minimum << 4)).view(torch.int8).view(scale.shape[0], across, -1)

    @classmethod
    def _split(cls, numbers: torch.Tensor) -> list[torch.Tensor]:
        both = numbers.contiguous().view(torch.uint8).flatten(1)
        return [(both & 15).view(torch.int8), (both >> 4).view(torch.int8)]


class Q3K(BlockFormat):
    """q3_k: 3-bit codes - 4; per 16 columns a 6-bit scale, signed."""

    name: ClassVar[str] = "q3_k"
    code: ClassVar[int] = 7
    tile_bytes: ClassVar[int] = 228
    bits: ClassVar[float] = 3.5625
    low, high, group, offset, most = 2, 1, 16, 4, 31


class Q4K(BlockFormat):
    """q4_k: 4-bit codes; per 32 columns a 6-bit scale and minimum."""

    name: ClassVar[str] = "q4_k"
    code: ClassVar[int] = 8
    tile_bytes: ClassVar[int] = 296
    bits: ClassVar[float] = 4.625
    has_min, most = True, 63


class Q5K(BlockFormat):
    """q5_k: 5-bit codes; per 32 columns a 6-bit scale and minimum."""

    name: ClassVar[str] = "q5_k"
    code: ClassVar[int] = 9
    tile_bytes: ClassVar[int] = 360
    bits: ClassVar[float] = 5.625
    high, has_min, most = 1, True, 63


class Q6K(BlockFormat):
    """q6_k: 6-bit codes - 32; per 16 columns an 8-bit scale, signed."""

    name: ClassVar[str] = "q6_k"
    code: ClassVar[int] = 10
    tile_bytes: ClassVar[int] = 420
    bits: ClassVar[float] = 6.5625
    high, group, offset, most = 2, 16, 32, 127


class IQ4XS(BlockFormat):
    """iq4_xs: 4-bit codes of a table; per 32 columns a 6-bit scale, signed."""

    name: ClassVar[str] = "iq4_xs"
    code: ClassVar[int] = 11
    tile_bytes: ClassVar[int] = 276
    bits: ClassVar[float] = 4.3125
    table, most = IQ4_VALUES, 31


class IQ4NL(BlockFormat):
    """iq4_nl: 4-bit codes of a table; per 32 columns an fp16 scale."""

    name: ClassVar[str] = "iq4_nl"
    code: ClassVar[int] = 12
    tile_bytes: ClassVar[int] = 288
    bits: ClassVar[float] = 4.5
    table, superblock = IQ4_VALUES, False


class Q5_0(BlockFormat):
    """q5_0: 5-bit codes - 16; per 32 columns an fp16 scale."""

    name: ClassVar[str] = "q5_0"
    code: ClassVar[int] = 13
    tile_bytes: ClassVar[int] = 352
    bits: ClassVar[float] = 5.5
    high, offset, superblock = 1, 16, False


class Q5_1(BlockFormat):
    """q5_1: 5-bit codes; per 32 columns an fp16 scale and minimum."""

    name: ClassVar[str] = "q5_1"
    code: ClassVar[int] = 14
    tile_bytes: ClassVar[int] = 384
    bits: ClassVar[float] = 6.0
    high, has_min, superblock = 1, True, False


class MXFP4(BlockFormat):
    """mxfp4: E2M1 codes; per 32 columns a power of two. Source: OCP Microscaling Formats (MX) specification 1.0."""

    name: ClassVar[str] = "mxfp4"
    code: ClassVar[int] = 15
    tile_bytes: ClassVar[int] = 272
    bits: ClassVar[float] = 4.25
    table, superblock, powers = MXFP4_VALUES, False, True


BLOCK_FORMATS = (Q2K(), Q3K(), Q4K(), Q5K(), Q6K(), IQ4XS(), IQ4NL(), Q5_0(), Q5_1(), MXFP4())
