"""y_g = x_g W_g^T for groups of columns, and its gradients: a product with a block-diagonal matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import native
from .linear import gradient_place
from .product import product


def grouped_columns(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., G, K], weight [N, K] of x's dtype -> [..., G, N / G]; group g is multiplied by the N / G rows from g N / G on.

    If the weight has a `main_grad`, its gradient is added to that, as in `linear`.
    """
    if x.dtype != weight.dtype or not native.usable(x, weight) or torch.is_autocast_enabled(x.device.type):
        return grouped_columns_reference(x, weight)
    result: torch.Tensor = _GroupedColumns.apply(x, weight)
    return result


def grouped_columns_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`grouped_columns` in plain torch."""
    return torch.einsum("...gk,gnk->...gn", x, weight.unflatten(0, (x.shape[-2], -1)))


class _GroupedColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = gradient_place(weight)
        flat, parts = x.reshape(-1, *x.shape[-2:]), weight.unflatten(0, (x.shape[-2], -1))
        out = native.new((*flat.shape[:2], parts.shape[1]), x)
        for group, part in enumerate(parts):
            product("nt", flat[:, group], part, out=out[:, group])
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        groups = x.shape[-2]
        flat, dy = (t.reshape(-1, *t.shape[-2:]) for t in (x, grads[0]))
        main_grad = getattr(ctx.place, "main_grad", None)
        dx = native.new(flat.shape, x) if needs_x else None
        dw = main_grad if main_grad is not None else native.new(weight.shape, weight) if needs_weight else None
        for group, part in enumerate(weight.unflatten(0, (groups, -1))):
            if dx is not None:
                product("nn", dy[:, group], part, out=dx[:, group])
            if dw is not None:
                product("tn", dy[:, group], flat[:, group], out=dw.unflatten(0, (groups, -1))[group], add=dw is main_grad)
        return None if dx is None else dx.view(x.shape), None if dw is main_grad else dw
