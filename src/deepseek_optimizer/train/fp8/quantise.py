"""Tiles of numbers in FP8: codes, and a power of two for each tile, so that the largest of the tile just fits.

Exact: the division by a scale (a power of two), and code times scale, in bf16 as in fp32. Rounded, once: the quotient to the
code's 4 (E4M3) or 3 (E5M2) significant bits, to nearest, ties to even; below 2^-9 (2^-16) of the scale to zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILE = 128
ROW, COLUMN, BLOCK = (1, TILE), (TILE, 1), (TILE, TILE)  # tiles along rows, along columns, and square blocks
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The largest number is 0.875 * 2^n in both: 448 = 0.875 * 2^9, 57344 = 0.875 * 2^16.
_LARGEST, _EXPONENT = 0.875, {E4M3: 9, E5M2: 16}
_SMALLEST_SCALE = -100  # its exponent; tiles of smaller numbers round to fewer bits, and products of two scales stay normal


def quantise(x: torch.Tensor, tile: tuple[int, int], dtype: torch.dtype = E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of x: x is about code * scale.

    Args:
        x: [..., R, C], bf16 or fp32. Tiles at the edges may be smaller.
        tile: its rows and columns.
        dtype: E4M3 or E5M2.

    Returns: codes [..., R, C] of `dtype`, scales [..., ceil(R / rows), ceil(C / columns)] fp32. A tile with a number that is
        not finite has the scale NaN, so that nothing hides it.
    """
    tiles = _tiled(x.float(), tile)
    scale = _scales(tiles.abs().amax((-3, -1)), dtype)
    codes = (tiles / scale[..., :, None, :, None]).to(dtype)
    return _untiled(codes, x.shape), scale


def dequantise(codes: torch.Tensor, scale: torch.Tensor, tile: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Code times scale, of `dtype`: exact in fp32, and with scales that are powers of two in bf16."""
    tiles = _tiled(codes.float(), tile)
    return _untiled((tiles * scale[..., :, None, :, None]).to(dtype), codes.shape)


def round_trip(x: torch.Tensor, tile: tuple[int, int], dtype: torch.dtype = E4M3) -> torch.Tensor:
    """What x is once it has been in FP8, in x's own dtype."""
    codes, scale = quantise(x, tile, dtype)
    return dequantise(codes, scale, tile, x.dtype)


def _scales(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest power of two by which `largest` divides into the format's range; 1 for zero, NaN for what is not finite."""
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, 0.5 <= mantissa < 1
    exponent = exponent - _EXPONENT[dtype] + (mantissa > _LARGEST).int()
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=_SMALLEST_SCALE))
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    return torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))


def _tiled(x: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """[..., R, C] -> [..., tiles down, rows, tiles across, columns], zeros beyond the edges."""
    down, across = -(-x.shape[-2] // tile[0]), -(-x.shape[-1] // tile[1])
    missing = (0, across * tile[1] - x.shape[-1], 0, down * tile[0] - x.shape[-2])
    padded = F.pad(x, missing) if any(missing) else x
    return padded.reshape(*x.shape[:-2], down, tile[0], across, tile[1])


def _untiled(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Back to [..., R, C]."""
    *batch, down, rows, across, columns = tiles.shape
    whole = tiles.reshape(*batch, down * rows, across * columns)
    return whole[..., : shape[-2], : shape[-1]].contiguous()
