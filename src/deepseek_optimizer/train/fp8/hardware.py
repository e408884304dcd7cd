"""Products on FP8 tensor cores: `torch.nn.functional.scaled_mm` with block-wise scales (`quant/scaled_mm.py`).

UNVERIFIED on hardware, for lack of a device. Tests check that torch accepts the shapes, strides and dtypes (its own checks, on
meta tensors), and that codes and scales equal those of the emulation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...quant import scaled_mm
from ...quant.scaled_mm import FOUR, why_not
from .quantize import BLOCK, ROW, TILE, quantize

__all__ = ["multiply", "why_not"]


def multiply(a: torch.Tensor, b: torch.Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype, b_blocks: bool) -> torch.Tensor:
    """a b^T [M, N] in bf16, summed in fp32.

    Args:
        a: [M, K], to be quantized in 1 x 128 tiles.
        b: [N, K], to be quantized in 128 x 128 blocks if `b_blocks` (a weight), else in 1 x 128 tiles.
        a_dtype, b_dtype: FP8 formats of the codes.
    """
    M, N = a.shape[0], b.shape[0]
    a, b = _padded(a), _padded(b)
    a_codes, a_scale = quantize(a, ROW, a_dtype)
    b_codes, b_scale = quantize(b, BLOCK if b_blocks else ROW, b_dtype)
    b_scale = _columns_of_four(b_scale) if b_blocks else _columns(b_scale)
    return scaled_mm.multiply(a_codes, _columns(a_scale), b_codes, b_scale, b_blocks, torch.bfloat16)[:M, :N]


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Pads both dimensions with zeros to multiples of 128, so that all tiles are full; the zeros change no sum."""
    missing = (0, -x.shape[1] % TILE, 0, -x.shape[0] % TILE)
    return F.pad(x, missing) if any(missing) else x


def _columns(scale: torch.Tensor) -> torch.Tensor:
    """[R, K / 128] in column-major order."""
    return scale.t().contiguous().t()


def _columns_of_four(scale: torch.Tensor) -> torch.Tensor:
    """[N / 128, K / 128] -> [K / 128 rounded up to a multiple of four, N / 128], in column-major order."""
    return F.pad(scale, (0, -scale.shape[1] % FOUR)).t()
