"""RoPE of the last elements of a head, in pairs (2i, 2i + 1) that stay where they are (DeepSeek-V4).

Computed in fp32 (fp64 for fp64) and rounded once. `ops.rope` rotates the first elements of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

_CHUNK: Final = 1 << 18  # elements at a time: 1 MB in fp32


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, S, H, D] -> the same shape. The transpose, `turn(x, cos, -sin)`, turns back.

    Args:
        cos, sin: [B or 1, S, R / 2], of the last R elements of a head.
    """
    result: torch.Tensor = _Turn.apply(x, cos, sin)
    return result


def turn_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`turn` in plain torch."""
    wide, width = x.to(torch.promote_types(x.dtype, torch.float32)), 2 * cos.shape[-1]
    a, b = wide[..., -width::2], wide[..., -width + 1 :: 2]
    c, s = cos[:, :, None].to(wide.dtype), sin[:, :, None].to(wide.dtype)
    turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    return torch.cat((x[..., :-width], turned.to(x.dtype)), -1)


def normed_and_turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """turn(x / sqrt(mean(x^2) + eps), cos, sin); saves the result, which attention saves too, and a number per head."""
    result: torch.Tensor = _NormedAndTurned.apply(x, cos, sin, eps)
    return result


def normed_and_turned_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """`normed_and_turned` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return turn_reference(normed, cos, sin).to(x.dtype)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


class _NormedAndTurned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        out, roots = torch.empty_like(x), x.new_empty(*x.shape[:3], 1, dtype=exact)
        for at in _chunks(x):
            part = x[at].to(exact)
            torch.rsqrt(
                torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_().div_(x.shape[3]).add_(eps), out=roots[at]
            )
            out[at] = _turn_tail(part * roots[at], *_angles(cos, sin, at, exact))
        ctx.save_for_backward(out, roots, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        y, roots, cos, sin = ctx.saved_tensors
        dx = torch.empty_like(y)
        for at in _chunks(y):
            part, upstream = y[at].to(roots.dtype), grads[0][at].to(roots.dtype)
            inner = (part * upstream).sum(-1, keepdim=True).div_(-y.shape[3])
            grad = torch.addcmul(upstream, part, inner).mul_(roots[at])
            dx[at] = _turn_tail(grad, *_angles(cos, -sin, at, roots.dtype))
        return dx, None, None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    exact, width = torch.promote_types(x.dtype, torch.float32), 2 * cos.shape[-1]
    out = x.clone(memory_format=torch.contiguous_format)
    for at in _chunks(x):
        tail = out[at][..., -width:]
        tail.copy_(_turn_tail(tail.to(exact, copy=True), *_angles(cos, sin, at, exact)))
    return out


def _turn_tail(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [S, H, D] with its last elements turned in place; cos, sin [S, 1, R / 2]."""
    width = 2 * cos.shape[-1]
    a, b = x[..., -width::2], x[..., x.shape[-1] - width + 1 :: 2]
    turned = a * cos - b * sin
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)
    return x


def _angles(cos: torch.Tensor, sin: torch.Tensor, at: tuple[int, slice], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    row, tokens = min(at[0], len(cos) - 1), at[1]
    return tuple(t[row, tokens, None].to(dtype) for t in (cos, sin))


def _chunks(x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    batch, tokens, heads, width = x.shape
    step = max(1, _CHUNK // max(1, heads * width))
    return ((b, slice(begin, begin + step)) for b in range(batch) for begin in range(0, tokens, step))
