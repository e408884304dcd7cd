"""Gradients of a loss that its forward pass has computed: how it keeps them, and how the backward pass returns them."""

from __future__ import annotations

from typing import Any

import torch

from . import native
from .linear import gradient_place
from .scale import scale_into


def keep(ctx: Any, weight: torch.Tensor, dhidden: torch.Tensor | None, dweight: torch.Tensor | None) -> None:
    """Keeps the gradients for `scaled`; that of the head in the dtype of `weight`, unless it is to be added to `main_grad`."""
    if dweight is not None and dweight.dtype != weight.dtype and getattr(weight, "main_grad", None) is None:
        dweight = scale_into(native.new(weight.shape, weight), dweight)
    ctx.gradients, ctx.weight = (dhidden, dweight), gradient_place(weight)


def scaled(ctx: Any, upstream: torch.Tensor, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The kept gradients times that of the loss; None for the head's if it was added to `main_grad`.

    Args:
        name: of the op, for the error of a second backward.
    """
    if ctx.gradients is None:
        raise RuntimeError(f"{name}: the first backward freed its gradients; call backward only once")
    (dhidden, dweight), ctx.gradients = ctx.gradients, None
    scale, main = float(upstream), getattr(ctx.weight, "main_grad", None)
    if dweight is not None and main is not None:
        scale_into(main, dweight, scale, add=True)
        dweight = None
    for gradient in (dhidden, dweight):
        if gradient is not None and scale != 1.0:
            scale_into(gradient, gradient, scale)
    return dhidden, dweight
