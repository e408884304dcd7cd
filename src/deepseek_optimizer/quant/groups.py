"""Common parts of the integer formats: groups of 32 columns with an fp16 scale.

Corner cases are part of the definition (`dso_pack` in native/include/dso.h): quotients use the scale after rounding to fp16,
and are rounded half to even; a scale of zero gives zero codes; a scale that is not finite becomes NaN, with zero codes.
"""

from __future__ import annotations

import torch

from .base import TILE_COLS

FP16_ROUNDING, FP16_TINY = 2.0**-11, 2.0**-25  # relative error of rounding to fp16, absolute where fp16 is subnormal


def grouped(panel: torch.Tensor) -> torch.Tensor:
    """[n, 32g] -> float32 [n, g, 32]."""
    return panel.float().view(panel.shape[0], -1, TILE_COLS)


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to fp16, with a single zero (positive) and a single NaN."""
    half = scale.to(torch.float16)
    half.masked_fill_(half == 0, 0.0)
    return half.masked_fill_(~half.isfinite(), torch.nan)


def quantize(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """rint(groups / scale) clamped to [low, high], float32 [n, g, 32]; zeros where the scale is zero or NaN."""
    usable = (scale != 0) & scale.isfinite()
    q = groups / scale.float().masked_fill(~usable, torch.inf).unsqueeze(-1)
    if not usable.all():
        q.masked_fill_(~usable.unsqueeze(-1), 0.0)
    return q.round_().clamp_(low, high)


def to_words(q: torch.Tensor) -> torch.Tensor:
    """Integers in [0, 255], float32 [n, g, 32] -> bytes, as int32 words [n, g, 8]."""
    return q.to(torch.uint8).view(torch.int32)


def join_nibbles(q: torch.Tensor) -> torch.Tensor:
    """Joins bytes in [0, 15], int32 words [n, g, 8], to words [n, g, 4] of nibbles: columns 8j..8j+3 low, 8j+4..8j+7 high."""
    low, high = q.view(*q.shape[:2], 4, 2).unbind(-1)
    return low | (high << 4)


def split_nibbles(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `join_nibbles`, as bytes: int32 words [n, g, 4] -> uint8 [n, g, 32]."""
    mask = 0x0F0F0F0F
    return torch.stack((words & mask, (words >> 4) & mask), -1).flatten(-2).view(torch.uint8)


def scale_error(scale: torch.Tensor) -> torch.Tensor:
    """Maximum error of rounding a scale to fp16."""
    return (scale.abs() * FP16_ROUNDING).clamp_min(FP16_TINY)


def ungroup(groups: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[16t, g, 32] -> [N, K], the shape of `like`: drops the padding."""
    return groups.flatten(1)[: like.shape[0], : like.shape[1]]
