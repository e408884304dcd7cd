"""Rows of an int4 cache: 4-bit codes of a row's Hadamard transform, and one scale.

A row x of d elements (a key or value of one head, or a group of a latent) becomes y = H x, where H is the Hadamard matrix, and
is stored as y = scale * IQ4_VALUES[code]. H spreads a few large elements over all others (Ashkboos et al. 2024, QuaRot), after
which y is nearly normal; ggml's IQ4_NL values suit that better than evenly spaced ones. As H H = d, the product of two rows is
that of their transforms over d: kernels transform the query instead of every key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...quant.blocks import IQ4_VALUES

_TINY = 1e-30  # rows below it are stored as zeros


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """H x over the last axis. If its length is no power of two, it is split into powers of two, largest first, each
    transformed by itself."""
    return torch.cat([_transformed(part) for part in x.split(_orders(x.shape[-1]), -1)], -1)


def hadamard_inverse(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `hadamard`."""
    return torch.cat([_transformed(part) / part.shape[-1] for part in x.split(_orders(x.shape[-1]), -1)], -1)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds float32 rows [..., d], d even, to codes uint8 [..., d / 2], of which a byte holds two, the first in its low half,
    and scales float32 [...].

    The largest element in magnitude becomes -127 or -145, whichever has the smaller squared error; of this scale and the one
    that fits its codes best, the better is used. Rows with a NaN or an infinity have the scale NaN.
    """
    y = hadamard(x)
    top = y.gather(-1, y.abs().argmax(-1, keepdim=True))
    best = top / -127
    for scale in (top / -145, None):
        best = _better(y, best, _fitted(y, best) if scale is None else scale)
    finite, empty = y.isfinite().all(-1, keepdim=True), top.abs() < _TINY
    codes = torch.where(finite & ~empty, _codes(y, best), 0).to(torch.uint8)
    scale = torch.where(finite, torch.where(empty, 0.0, best), torch.nan)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale[..., 0]


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The rows of `quantized`, float32 [..., d]."""
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return hadamard_inverse(values[pairs.long()] * scale[..., None])


def _orders(length: int) -> list[int]:
    return [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1]


def _transformed(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1]
    for half in _halves(size):
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
    return x


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _codes(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest values; ties go to the lower one."""
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=y.device)
    return torch.bucketize(y * (1 / scale), (values[1:] + values[:-1]) / 2)


def _rounded(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=y.device)[_codes(y, scale)]


def _fitted(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale with the smallest squared error for the codes that `scale` gives."""
    values = _rounded(y, scale)
    return (y * values).sum(-1, keepdim=True) / (values * values).sum(-1, keepdim=True)


def _better(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    def error(scale: torch.Tensor) -> torch.Tensor:
        return (_rounded(y, scale) * scale - y).square().sum(-1, keepdim=True)

    return torch.where(error(b) < error(a), b, a)
