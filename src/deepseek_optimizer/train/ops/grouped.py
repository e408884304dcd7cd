"""Grouped products: each group of rows is multiplied by its own matrix, as in experts (DeepSeekMoE, arXiv 2401.06066, section
3). All groups share one parallel section, so that small groups have no overhead."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import native
from .linear import check_columns, gradient_place
from .product import grouped_product


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight [E, N, K], offsets int64 [E + 1] -> [T, N]: rows [offsets[e], offsets[e + 1]) times weight[e]^T.

    Groups may be empty; the gradient of their matrix is zero. Autocast and `main_grad` work as in `linear`. Raises ValueError.
    """
    check_grouped("grouped_linear", x, weight, offsets)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype or not native.usable(x, weight):
        return grouped_linear_reference(x, weight, offsets)
    result: torch.Tensor = _GroupedLinear.apply(x, weight, offsets)
    return result


def grouped_linear_reference(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """One product per group, in torch."""
    ends = offsets.tolist()
    return torch.cat([x[a:b] @ w.t() for a, b, w in zip(ends, ends[1:], weight, strict=False)])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, offsets)
        ctx.weight = gradient_place(weight)
        return grouped_product("nt", x, weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, offsets = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = grouped_product("nn", dy, weight, offsets) if needs_x else None
        return dx, grouped_weight_gradient(ctx.weight, dy, x, offsets) if needs_weight else None, None


def grouped_weight_gradient(
    weight: torch.Tensor | None, dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor | None:
    """dy_e^T x_e of every group [E, N, K], of dy's dtype; None if it was added to the weight's `main_grad`."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grouped_product("tn", dy, x, offsets)
    grouped_product("tn", dy, x, offsets, out=main_grad, add=True)
    return None


def check_grouped(op: str, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> None:
    """ValueError if shapes do not match or offsets do not ascend over all rows."""
    check_columns(op, x, weight)
    if x.dim() != 2 or weight.dim() != 3:
        raise ValueError(f"{op}: x must be [T, K] and weight [E, N, K], got {list(x.shape)} and {list(weight.shape)}")
    if offsets.dtype != torch.int64 or offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(f"{op}: offsets must be int64 [{weight.shape[0] + 1}], got {offsets.dtype} {list(offsets.shape)}")
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0] or ends != sorted(ends):
        raise ValueError(f"{op}: offsets must ascend from 0 to {x.shape[0]}, the number of rows; got {ends}")
