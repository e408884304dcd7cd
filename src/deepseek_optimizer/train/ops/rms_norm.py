"""y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467).

Arithmetic in fp32, rounded once. Kept for the backward: x, w, and a number a row. The gradient of w is summed over pieces of
rows that do not depend on threads.
"""

from __future__ import annotations

from typing import Any

import torch

from . import native


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight [n] -> [..., n] of x's dtype (with a weight of another dtype: of both together).

    Raises ValueError where the weight is not as long as x's rows.
    """
    _check(x, weight)
    if not native.usable(x, weight) or x.dtype != weight.dtype:
        return rms_norm_reference(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, and its norm, in one pass. x, delta [..., n], weight [n] -> twice [..., n].

    Raises ValueError where shapes differ.
    """
    _check(x, weight)
    if x.shape != delta.shape:
        raise ValueError(f"add_rms_norm: x is {list(x.shape)}, delta {list(delta.shape)}")
    if not native.usable(x, delta, weight) or not x.dtype == delta.dtype == weight.dtype:
        return add_rms_norm_reference(x, delta, weight, eps)
    return _add_rms_norm(x, delta, weight, eps)[:2]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return y.to(torch.promote_types(x.dtype, weight.dtype))


def add_rms_norm_reference(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    total = x + delta
    return total, rms_norm_reference(total, weight, eps)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x is {list(x.shape)}, weight {list(weight.shape)}: they must agree in the last dimension")


# ---- as torch knows them


@torch.library.custom_op("dso::train_rms_norm", mutates_args=(), device_types="cpu")
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    flat = native.rows(x)
    y, rstd = _empty(x), x.new_empty(len(flat), dtype=torch.float32)
    _forward(flat, None, weight, eps, None, native.rows(y), rstd)
    return y, rstd


@torch.library.custom_op("dso::train_add_rms_norm", mutates_args=(), device_types="cpu")
def _add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = native.rows(x)
    total, y, rstd = _empty(x), _empty(x), x.new_empty(len(flat), dtype=torch.float32)
    _forward(flat, native.rows(delta), weight, eps, native.rows(total), native.rows(y), rstd)
    return total, y, rstd


@torch.library.custom_op("dso::train_rms_norm_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, more: torch.Tensor | None, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (and what is added to it) and, in fp32, of the weight (empty where it is not needed)."""
    dx, dw = _empty(x), x.new_empty(weight.numel() if needs_weight else 0, dtype=torch.float32)
    flat, n, weight = native.rows(dy.to(x.dtype)), x.shape[-1], weight.contiguous()
    to, kept, extra = native.rows(dx), native.rows(x), None if more is None else native.rows(more.to(x.dtype))
    native.call(
        "dso_train_rms_norm_backward", len(flat), n, native.matrix(flat), native.matrix(kept), weight.data_ptr(),
        rstd.data_ptr(), native.matrix(extra), native.matrix(to), dw.data_ptr() if needs_weight else None,
    )  # fmt: skip
    return dx, dw


@_rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@_add_rms_norm.register_fake
def _(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    return _empty(x), _empty(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, more: torch.Tensor | None, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(x), x.new_empty(weight.numel() if needs_weight else 0, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    added = len(output) == 3
    ctx.save_for_backward(output[0] if added else inputs[0], inputs[-2], output[-1])
    ctx.mark_non_differentiable(output[-1])


def _rms_norm_gradients(ctx: Any, dy: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    dx, dw = _gradients(ctx, dy, None)
    return dx, dw, None


def _add_rms_norm_gradients(ctx: Any, dtotal: torch.Tensor, dy: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    dx, dw = _gradients(ctx, dy, dtotal)
    return dx, dx, dw, None


def _gradients(ctx: Any, dy: torch.Tensor, more: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    needs_weight = ctx.needs_input_grad[-2]
    dx, dw = _backward(dy, x, weight, rstd, more, needs_weight)
    return dx, dw.to(weight.dtype) if needs_weight else None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_keep)
_add_rms_norm.register_autograd(_add_rms_norm_gradients, setup_context=_keep)


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    y: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    weight, m = weight.contiguous(), native.matrix
    native.call("dso_train_rms_norm", *x.shape, m(x), m(delta), weight.data_ptr(), eps, m(total), m(y), rstd.data_ptr())
