"""y = x W^T + b with its three products in FP8, for a single matrix and for groups of rows (experts)."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..ops.grouped import check_grouped
from ..ops.linear import bias_gradient, check_columns, gradient_place, rows_of
from .backend import Fp8Products


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Fp8Products) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N], bf16 or fp32 -> x weight^T + bias [..., N] of x's dtype.

    The operands are saved unquantized. The backward pass quantizes them along the other dimension, from the original values
    rather than from rounded ones. Gradients are added to `main_grad` as in `ops.linear.linear`. Raises ValueError.

    Args:
        products: the FP8 backend.
    """
    check_columns("fp8_linear", x, weight)
    result: torch.Tensor = _Fp8Linear.apply(x, weight, bias, products)
    return result


def fp8_grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, products: Fp8Products) -> torch.Tensor:
    """x [T, K], weight [E, N, K], offsets int64 [E + 1] -> [T, N]; see `ops.grouped.grouped_linear`. No tile spans two
    groups."""
    check_grouped("fp8_grouped_linear", x, weight, offsets)
    result: torch.Tensor = _Fp8GroupedLinear.apply(x, weight, offsets, products)
    return result


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Fp8Products
    ) -> torch.Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight, ctx.bias, ctx.shape, ctx.products = gradient_place(weight), gradient_place(bias), x.shape, products
        return products.forward(rows_of(x), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy, products = rows_of(dy), ctx.products
        dx = products.input_gradient(dy, weight).view(ctx.shape) if needs_x else None
        dw = _weight_gradient(ctx.weight, dy, rows_of(x), products) if needs_weight else None
        return dx, dw, bias_gradient(ctx.bias, dy) if needs_bias else None, None


class _Fp8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, products: Fp8Products) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.products, ctx.parts = gradient_place(weight), products, _parts(offsets)
        return torch.cat([products.forward(x[a:b], w, None) for (a, b), w in zip(ctx.parts, weight, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x, weight), products, parts = ctx.saved_tensors, ctx.products, ctx.parts
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = (
            torch.cat([products.input_gradient(dy[a:b], w) for (a, b), w in zip(parts, weight, strict=True)])
            if needs_x
            else None
        )
        return dx, _grouped_weight_gradient(ctx.weight, weight, dy, x, parts, products) if needs_weight else None, None, None


def _weight_gradient(
    weight: torch.Tensor | None, dy: torch.Tensor, x: torch.Tensor, products: Fp8Products
) -> torch.Tensor | None:
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return products.weight_gradient(dy, x)
    products.weight_gradient(dy, x, out=main_grad, add=True)
    return None


def _grouped_weight_gradient(
    leaf: torch.Tensor | None,
    weight: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    parts: list[tuple[int, int]],
    products: Fp8Products,
) -> torch.Tensor | None:
    main_grad = getattr(leaf, "main_grad", None)
    out = torch.zeros_like(weight) if main_grad is None else main_grad
    for (a, b), into in zip(parts, out, strict=True):
        if b > a:
            products.weight_gradient(dy[a:b], x[a:b], out=into, add=main_grad is not None)
    return out if main_grad is None else None


def _parts(offsets: torch.Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip(ends, ends[1:], strict=False))
