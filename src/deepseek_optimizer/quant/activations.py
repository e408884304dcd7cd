"""Activation formats of matrix products: a reference conversion, and the exact row layout of `native/include/dso.h`.

Kinds, in groups of 32 columns (the width padded with zeros); `steps` is 127 for q8 and 32512 for q16:
    q8, q16:  scale = max|x| / steps,  q = rint(x * (steps / max|x|)),  sum = sum of q
    q16 stores q in two bytes, hi = (q + 128) >> 8 and lo = q - 256 hi, so that two int8 products compute it.
    bf16:     rounded to nearest even.      f32: unchanged.
A group whose factor overflows (zeros, tiny values) has scale 0 and q = 0; one with a NaN or infinity has scale NaN and q = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .base import TILE_COLS

KINDS = ("f32", "bf16", "q8", "q16")
_STEPS = {"q8": 127, "q16": 32512}
_ROW_ALIGN = 64


@dataclass(frozen=True)
class QuantizedRows:
    """Rows quantized in groups. q: int32 [T, g, 32]; scale: float32 [T, g]; total: int32 [T, g], the sum of q."""

    q: torch.Tensor
    scale: torch.Tensor
    total: torch.Tensor


def _check(kind: str, x: torch.Tensor) -> None:
    if kind not in KINDS:
        raise ConfigError(f"unknown kind of activation {kind!r} (supported: {', '.join(KINDS)})")
    if x.dim() != 2:
        raise ValueError(f"activations must be rows [T, width], not {tuple(x.shape)}")


def quantize_rows(x: torch.Tensor, kind: str) -> QuantizedRows:
    """Quantizes float [T, width] to integers in groups of 32 columns; kind "q8" or "q16"."""
    _check(kind, x)
    steps = _STEPS[kind]
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % TILE_COLS)).view(x.shape[0], -1, TILE_COLS)
    top = x.abs().amax(-1)
    factor = steps / top
    broken, empty = ~top.isfinite(), factor.isinf()
    scale = (top / steps).masked_fill(empty, 0.0).masked_fill(broken, torch.nan)
    q = (x * factor.unsqueeze(-1)).round().masked_fill((broken | empty).unsqueeze(-1), 0.0).to(torch.int32)
    return QuantizedRows(q, scale, q.sum(-1, dtype=torch.int32))


def fake_quantize(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Quantizes and dequantizes x as a product of this kind does: float [..., width] -> float32 [..., width]."""
    rows = x.reshape(-1, x.shape[-1])
    _check(kind, rows)
    if kind == "f32":
        return x.float()
    if kind == "bf16":
        return x.to(torch.bfloat16).float()
    quantized = quantize_rows(rows, kind)
    values = quantized.q.float() * quantized.scale.unsqueeze(-1)
    return values.flatten(1)[:, : x.shape[-1]].reshape(x.shape)


def row_bytes(kind: str, width: int) -> int:
    """Bytes of one row, equal to `dso_row_bytes`."""
    padded = -(-width // TILE_COLS) * TILE_COLS
    groups = padded // TILE_COLS
    size = {"f32": 4 * width, "bf16": 2 * padded, "q8": padded + 8 * groups, "q16": 2 * padded + 8 * groups}[kind]
    return -(-size // _ROW_ALIGN) * _ROW_ALIGN


def convert(x: torch.Tensor, kind: str) -> torch.Tensor:
    """float [T, width] -> uint8 [T, row_bytes], equal to `dso_convert`; bytes after the last element are zero."""
    _check(kind, x)
    if kind == "f32":
        parts = [x.float().contiguous()]
    elif kind == "bf16":
        parts = [torch.nn.functional.pad(x.to(torch.bfloat16), (0, -x.shape[1] % TILE_COLS)).contiguous()]
    else:
        rows = quantize_rows(x, kind)
        q = rows.q.flatten(1)
        high = (q + 128) >> 8
        codes = [q] if kind == "q8" else [high, q - 256 * high]
        parts = [code.to(torch.int8) for code in codes] + [rows.scale, rows.total]
    row = torch.cat([p.view(torch.uint8) for p in parts], -1)
    return torch.nn.functional.pad(row, (0, row_bytes(kind, x.shape[1]) - row.shape[1]))
