"""a + b of one shape and dtype, where a step's tensors lie."""

from __future__ import annotations

from typing import Any

import torch

from . import native


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As torch's own sum, to the bit; shapes and dtypes that are not equal are torch's business."""
    if a.shape != b.shape or a.dtype != b.dtype or not (native.usable(a, b) and a.is_contiguous() and b.is_contiguous()):
        return a + b
    found: torch.Tensor = _Add.apply(a, b)
    return found


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.add(a, b, out=native.new(a.shape, a))

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return upstream[0], upstream[0]
