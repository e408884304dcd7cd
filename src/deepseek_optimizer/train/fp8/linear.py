"""y = x W^T + b with its three products in FP8, alone and for groups of rows (experts)."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..ops.grouped import check_grouped
from ..ops.linear import bias_gradient, check_columns, gradient_place, rows_of
from .backend import Fp8Products


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: Fp8Products) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N], bf16 (or fp32) -> [..., N] of x's dtype. What the backward needs is kept as it is,
    and quantised there along the other dimension, from the original rather than from rounded tiles.

    A weight's `main_grad` is added to, as `ops.linear.linear` does.
    """
    check_columns("fp8_linear", x, weight)
    found: torch.Tensor = _Fp8Linear.apply(x, weight, bias, how)
    return found


def fp8_grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, how: Fp8Products) -> torch.Tensor:
    """x [T, K], weight [E, N, K], offsets int64 [E + 1] -> [T, N], as `ops.grouped.grouped_linear`. No tile spans two
    groups."""
    check_grouped("fp8_grouped_linear", x, weight, offsets)
    found: torch.Tensor = _Fp8GroupedLinear.apply(x, weight, offsets, how)
    return found


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: Fp8Products) -> torch.Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight, ctx.bias, ctx.shape, ctx.how = gradient_place(weight), gradient_place(bias), x.shape, how
        return how.forward(rows_of(x), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy, how = rows_of(dy), ctx.how
        dx = how.input_gradient(dy, weight).view(ctx.shape) if needs_x else None
        dw = _weight_gradient(ctx.weight, dy, rows_of(x), how) if needs_weight else None
        return dx, dw, bias_gradient(ctx.bias, dy) if needs_bias else None, None


class _Fp8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, how: Fp8Products) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.how, ctx.parts = gradient_place(weight), how, _parts(offsets)
        return torch.cat([how.forward(x[a:b], w, None) for (a, b), w in zip(ctx.parts, weight, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x, weight), how, parts = ctx.saved_tensors, ctx.how, ctx.parts
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = torch.cat([how.input_gradient(dy[a:b], w) for (a, b), w in zip(parts, weight, strict=True)]) if needs_x else None
        return dx, _grouped_weight_gradient(ctx.weight, weight, dy, x, parts, how) if needs_weight else None, None, None


def _weight_gradient(weight: torch.Tensor | None, dy: torch.Tensor, x: torch.Tensor, how: Fp8Products) -> torch.Tensor | None:
    total = getattr(weight, "main_grad", None)
    if total is None:
        return how.weight_gradient(dy, x)
    how.weight_gradient(dy, x, out=total, add=True)
    return None


def _grouped_weight_gradient(
    leaf: torch.Tensor | None,
    weight: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    parts: list[tuple[int, int]],
    how: Fp8Products,
) -> torch.Tensor | None:
    total = getattr(leaf, "main_grad", None)
    out = torch.zeros_like(weight) if total is None else total
    for (a, b), into in zip(parts, out, strict=True):
        if b > a:
            how.weight_gradient(dy[a:b], x[a:b], out=into, add=total is not None)
    return out if total is None else None


def _parts(offsets: torch.Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip(ends, ends[1:], strict=False))
