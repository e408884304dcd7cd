"""Rows of a table by number, and the gradient of the table: rows of the output's gradient, summed in fp32 by number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ...backends.cpu.buffers import address
from . import native
from .linear import gradient_place


def embedding(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """ids [...] of integers, weight [V, H] -> [..., H].

    The gradient of a weight that has a `main_grad` (fp32, of its shape) is added to that, and none is given to torch.

    Args:
        padding_idx: a number whose row has no gradient.

    Raises IndexError for a number that the table has no row for.
    """
    if not native.usable(weight) or ids.device.type != "cpu":
        return embedding_reference(ids, weight, padding_idx)
    found: torch.Tensor = _Embedding.apply(ids, weight, padding_idx)
    return found


def embedding_reference(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """Torch's own."""
    return F.embedding(ids, weight, padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.like, ctx.padding = gradient_place(weight), (weight.shape, weight.dtype), padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        shape, dtype = ctx.like
        total = getattr(ctx.weight, "main_grad", None)
        gradient = native.new(shape, dy, dtype) if total is None else total
        padding = -1 if ctx.padding is None else ctx.padding % shape[0]
        _rows_summed(native.rows(dy), ids.reshape(-1), padding, gradient, total is not None)
        return None, gradient if total is None else None, None


@torch.library.custom_op("dso::train_rows_summed", mutates_args=("out",), device_types="cpu")
def _rows_summed(x: torch.Tensor, numbers: torch.Tensor, ignored: int, out: torch.Tensor, add: bool) -> None:
    numbers = numbers.to(torch.int64).contiguous()
    into, rows = native.matrix(out, "out", (out.shape[0], x.shape[1])), native.matrix(x, "x")
    which = address(numbers, "numbers", torch.int64, x.shape[:1])
    native.call("dso_train_rows_summed", *x.shape, rows, which, ignored, out.shape[0], into, int(add), out=out)


@_rows_summed.register_fake
def _(x: torch.Tensor, numbers: torch.Tensor, ignored: int, out: torch.Tensor, add: bool) -> None:
    """It changes `out`, and makes nothing."""
