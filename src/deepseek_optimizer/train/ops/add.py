"""a + b for tensors of the same shape and dtype, allocated in the memory of training."""

from __future__ import annotations

from typing import Any

import torch

from . import native


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, bitwise equal to torch's. If shapes or dtypes differ, torch computes it."""
    if a.shape != b.shape or a.dtype != b.dtype or not (native.usable(a, b) and a.is_contiguous() and b.is_contiguous()):
        return a + b
    result: torch.Tensor = _Add.apply(a, b)
    return result


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.add(a, b, out=native.new(a.shape, a))

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return upstream[0], upstream[0]
