"""Embedding lookup. The gradient of the table sums the output's gradient rows by id, in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ...backends.cpu.buffers import address
from . import native
from .linear import gradient_place


def embedding(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """Integer ids [...], weight [V, H] -> [..., H].

    If the weight has a `main_grad` (fp32, of its shape), its gradient is added to that instead of being returned to torch.

    Args:
        padding_idx: an id whose row gets no gradient.

    Raises:
        IndexError: an id is out of range.
    """
    if not native.usable(weight) or ids.device.type != "cpu":
        return embedding_reference(ids, weight, padding_idx)
    result: torch.Tensor = _Embedding.apply(ids, weight, padding_idx)
    return result


def embedding_reference(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """Torch's implementation."""
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
        main_grad = getattr(ctx.weight, "main_grad", None)
        gradient = native.new(shape, dy, dtype) if main_grad is None else main_grad
        padding = -1 if ctx.padding is None else ctx.padding % shape[0]
        _rows_summed(native.rows(dy), ids.reshape(-1), padding, gradient, main_grad is not None)
        return None, gradient if main_grad is None else None, None


@torch.library.custom_op("dso::train_rows_summed", mutates_args=("out",), device_types="cpu")
def _rows_summed(x: torch.Tensor, numbers: torch.Tensor, ignored: int, out: torch.Tensor, add: bool) -> None:
    numbers = numbers.to(torch.int64).contiguous()
    into, rows = native.matrix(out, "out", (out.shape[0], x.shape[1])), native.matrix(x, "x")
    which = address(numbers, "numbers", torch.int64, x.shape[:1])
    native.call("dso_train_rows_summed", *x.shape, rows, which, ignored, out.shape[0], into, int(add), out=out)


@_rows_summed.register_fake
def _(x: torch.Tensor, numbers: torch.Tensor, ignored: int, out: torch.Tensor, add: bool) -> None:
    """Changes `out` in place; has no output."""
