"""Tile-wise quantization to FP8: codes, and a power-of-two scale per tile, chosen so that the largest element just fits.

Division by a scale and multiplication of a code by its scale are exact, in bf16 as in fp32. The quotient is rounded once, to
the code's 4 (E4M3) or 3 (E5M2) significant bits, to nearest, ties to even. The smallest subnormal is 2^-9 (2^-16) times the
scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILE = 128
ROW, COLUMN, BLOCK = (1, TILE), (TILE, 1), (TILE, TILE)  # tiles along rows, along columns, and square blocks
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The largest finite value is 0.875 * 2^n in both: 448 = 0.875 * 2^9, 57344 = 0.875 * 2^16.
_LARGEST, _EXPONENT = 0.875, {E4M3: 9, E5M2: 16}
_SMALLEST_SCALE = -100  # exponent; products of two scales stay normal, and tiles of smaller values lose precision


def quantize(x: torch.Tensor, tile: tuple[int, int], dtype: torch.dtype = E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes x to codes and scales: x is approximately code * scale.

    Args:
        x: [..., R, C], bf16 or fp32. Tiles at the edges may be smaller.
        tile: rows and columns of a tile.
        dtype: E4M3 or E5M2.

    Returns: codes [..., R, C] of `dtype`, scales [..., ceil(R / rows), ceil(C / columns)] fp32. A tile with an element that
        is not finite has the scale NaN, so that it stays visible.
    """
    tiles = _tiled(x.float(), tile)
    scale = _scales(tiles.abs().amax((-3, -1)), dtype)
    codes = (tiles / scale[..., :, None, :, None]).to(dtype)
    return _untiled(codes, x.shape), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, tile: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Code times scale as `dtype`: exact in fp32, and also in bf16 if the scales are powers of two."""
    tiles = _tiled(codes.float(), tile)
    return _untiled((tiles * scale[..., :, None, :, None]).to(dtype), codes.shape)


def round_trip(x: torch.Tensor, tile: tuple[int, int], dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Quantizes and dequantizes x; the result has x's dtype."""
    codes, scale = quantize(x, tile, dtype)
    return dequantize(codes, scale, tile, x.dtype)


def _scales(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest power of two s with largest / s in the format's range; 1 for zero, NaN for values that are not finite."""
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, 0.5 <= mantissa < 1
    exponent = exponent - _EXPONENT[dtype] + (mantissa > _LARGEST).int()
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=_SMALLEST_SCALE))
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    return torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))


def _tiled(x: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """[..., R, C] -> [..., tiles down, rows, tiles across, columns], padded with zeros."""
    down, across = -(-x.shape[-2] // tile[0]), -(-x.shape[-1] // tile[1])
    missing = (0, across * tile[1] - x.shape[-1], 0, down * tile[0] - x.shape[-2])
    padded = F.pad(x, missing) if any(missing) else x
    return padded.reshape(*x.shape[:-2], down, tile[0], across, tile[1])


def _untiled(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `_tiled`: [..., R, C]."""
    *batch, down, rows, across, columns = tiles.shape
    whole = tiles.reshape(*batch, down * rows, across * columns)
    return whole[..., : shape[-2], : shape[-1]].contiguous()
