"""y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467).

Computed in fp32 and rounded once. Saves x, w, and one value per row. The gradient of w is summed over chunks of rows that do
not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...backends.cpu.buffers import address, optional
from . import native, triton_ops
from .scale import scale_into


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight [n] -> [..., n] of x's dtype, or of the promoted dtype if the weight's differs.

    Raises:
        ValueError: the weight does not have n elements.
    """
    _check(x, weight)
    if x.dtype == weight.dtype and triton_ops.usable(x, weight):
        return triton_ops.rms_norm(x, weight, eps)
    if not native.usable(x, weight) or x.dtype != weight.dtype:
        return rms_norm_reference(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def rms_norm_of_dtype(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm`, of x's dtype also if that is bf16 and the weight is fp32; rounded once."""
    _check(x, weight)
    wide = torch.promote_types(x.dtype, weight.dtype)
    if weight.dtype == wide and triton_ops.usable(x, weight):
        return triton_ops.rms_norm(x, weight, eps)
    if x.dtype == wide or weight.dtype != wide or not native.usable(x, weight):
        return rms_norm(x, weight, eps).to(x.dtype)
    result: torch.Tensor = _OfDtype.apply(x, weight, eps)
    return result


def rms_norm_with_residual(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x), x), for residual connections: the two gradients of x are summed in the norm's backward pass."""
    _check(x, weight)
    if not native.usable(x, weight) or x.dtype != weight.dtype:
        return rms_norm(x, weight, eps), x
    result: tuple[torch.Tensor, torch.Tensor] = _WithResidual.apply(x, weight, eps)
    return result


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return y.to(torch.promote_types(x.dtype, weight.dtype))


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x is {list(x.shape)}, so weight must be {list(x.shape[-1:])}, got {list(weight.shape)}")


# ---- registration as torch ops


@torch.library.custom_op("dso::train_rms_norm", mutates_args=(), device_types="cpu")
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    flat, m, weight = native.rows(x), native.matrix, weight.contiguous()
    y, rstd = native.new(x.shape, x), native.new((len(flat),), x, torch.float32)
    scale = address(weight, "weight", x.dtype, flat.shape[1:])
    roots = address(rstd, "rstd", torch.float32, flat.shape[:1])
    native.call(
        "dso_train_rms_norm", *flat.shape, m(flat, "x"), scale, eps, m(native.rows(y), "y", flat.shape), roots, y=y, rstd=rstd
    )
    return y, rstd


@torch.library.custom_op("dso::train_rms_norm_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and, in fp32, of the weight (empty if it is not needed)."""
    dx, dw = native.new(x.shape, x), native.new((weight.numel() if needs_weight else 0,), x, torch.float32)
    flat, inputs, m, weight = native.rows(dy.to(x.dtype)), native.rows(x), native.matrix, weight.contiguous()
    scale = address(weight, "weight", x.dtype, flat.shape[1:])
    roots = address(rstd, "rstd", torch.float32, flat.shape[:1])
    sums = optional(dw if needs_weight else None, "dw", torch.float32, flat.shape[1:])
    operands = m(flat, "dy"), m(inputs, "x", flat.shape), scale, roots, m(native.rows(dx), "dx", flat.shape), sums
    native.call("dso_train_rms_norm_backward", *flat.shape, *operands, dx=dx, dw=dw)
    return dx, dw


@_rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return native.new(x.shape, x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return native.new(x.shape, x), x.new_empty(weight.numel() if needs_weight else 0, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    needs_weight = ctx.needs_input_grad[1]
    dx, dw = _backward(dy, x, weight, rstd, needs_weight)
    return dx, dw.to(weight.dtype) if needs_weight else None, None


_rms_norm.register_autograd(_gradients, setup_context=_save)


class _OfDtype(torch.autograd.Function):
    """Saves x in its own dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rstd = _rms_norm(x.to(weight.dtype), weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        dx, dw = _backward(grads[0].to(weight.dtype), x.to(weight.dtype), weight, rstd, needs_weight)
        return dx.to(x.dtype), dw if needs_weight else None, None


class _WithResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, residual_grad: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        dx, dw = _backward(dy, x, weight, rstd, needs_weight)
        scale_into(dx, residual_grad, add=True)
        return dx, dw.to(weight.dtype) if needs_weight else None, None
