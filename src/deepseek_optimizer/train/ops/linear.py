"""y = x W^T + b and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import native
from .product import column_sums, product


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N], all of one dtype. Autocast applies as in torch.

    If a weight or bias has a `main_grad` (fp32, of its shape), its gradient is added to that instead of being returned to
    torch.

    Raises:
        ValueError: shapes do not match.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    one_dtype = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    one_bias = bias is None or bias.shape == weight.shape[:1]
    if not (one_dtype and one_bias and native.usable(x, weight, bias)):
        return linear_reference(x, weight, bias)
    check_columns("linear", x, weight)
    result: torch.Tensor = _Linear.apply(x, weight, bias)
    return result


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """`linear` of the same x with several weights. The gradients of x are accumulated by the products themselves."""
    one_dtype = all(weight.dtype == x.dtype for weight in weights)
    if torch.is_autocast_enabled(x.device.type) or not (one_dtype and native.usable(x, *weights)):
        return tuple(linear(x, weight) for weight in weights)
    for weight in weights:
        check_columns("linears", x, weight)
    result: tuple[torch.Tensor, ...] = _Linears.apply(x, *weights)
    return result


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Torch's implementation, with its own errors."""
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight, ctx.bias, ctx.shape = gradient_place(weight), gradient_place(bias), x.shape
        y = product("nt", rows_of(x), weight, bias=bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = rows_of(dy)
        dx = product("nn", dy, weight).view(ctx.shape) if needs_x else None
        dw = weight_gradient(ctx.weight, dy, rows_of(x)) if needs_weight else None
        return dx, dw, bias_gradient(ctx.bias, dy) if needs_bias else None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        needs_x, *needed = ctx.needs_input_grad
        ctx.save_for_backward(x if any(needed) else None, *(weight if needs_x else None for weight in weights))
        ctx.weights, ctx.shape = [gradient_place(weight) for weight in weights], x.shape
        return tuple(product("nt", rows_of(x), weight).view(*x.shape[:-1], weight.shape[0]) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        needs_x, *needed = ctx.needs_input_grad
        gradients = [rows_of(dy) for dy in upstream]
        dx = None
        for dy, weight in zip(gradients, weights, strict=True) if needs_x else ():
            dx = product("nn", dy, weight, out=dx, add=dx is not None)
        entries = zip(needed, ctx.weights, gradients, strict=True)
        dw = [weight_gradient(place, dy, rows_of(x)) if wanted else None for wanted, place, dy in entries]
        return None if dx is None else dx.view(ctx.shape), *dw


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [T, K], a view where strides allow one."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def gradient_place(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The parameter, for access to its `main_grad` in the backward pass; a saved tensor may be returned as another object."""
    return parameter if parameter is not None and parameter.is_leaf and parameter.requires_grad else None


def weight_gradient(weight: torch.Tensor | None, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """dy^T x of dy's dtype; None if it was added to the weight's `main_grad`."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return product("tn", dy, x)
    product("tn", dy, x, out=main_grad, add=True)
    return None


def bias_gradient(bias: torch.Tensor | None, dy: torch.Tensor) -> torch.Tensor | None:
    """The column sums of dy; None if they were added to the bias's `main_grad`."""
    main_grad = getattr(bias, "main_grad", None)
    if main_grad is None:
        return column_sums(dy)
    column_sums(dy, out=main_grad, add=True)
    return None


def check_columns(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError if the last dimensions of x and the weight differ."""
    if x.dim() < 1 or weight.dim() < 2 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{op}: x is {list(x.shape)}, weight {list(weight.shape)}; their last dimensions must be equal")
