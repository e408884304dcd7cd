"""Checks of training ops: results and gradients against plain torch in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

# Relative to a tensor's largest element: two or three roundings in bf16, several in fp32.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2**-7}


def against_fp64(op: Callable[..., Any], reference: Callable[..., Any], operands: tuple[torch.Tensor, ...]) -> None:
    """Results of op, and the gradients of all operands, equal the reference's in fp64 up to rounding."""
    ours = [t.detach().requires_grad_() for t in operands]
    exact = [t.detach().double().requires_grad_() for t in operands]
    result, expected = _results(op, ours), _results(reference, exact)
    upstream = [torch.randn(y.shape).to(y.dtype) for y in result]
    torch.autograd.backward(result, upstream)
    torch.autograd.backward(expected, [g.double() for g in upstream])
    for a, b in zip([*result, *(t.grad for t in ours)], [*expected, *(t.grad for t in exact)], strict=True):
        assert a.shape == b.shape and a.dtype == operands[0].dtype
        if a.numel():
            worst = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-2)
            assert worst <= BOUNDS[a.dtype], (float(worst), list(a.shape))


def contiguous_and_not(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """x [rows, n]: contiguous, as columns of a wider tensor, and transposed."""
    yield x
    yield torch.cat([x, x], 1)[:, : x.shape[1]]
    yield x.t().contiguous().t()


def _results(op: Callable[..., Any], operands: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    result = op(*operands)
    return result if isinstance(result, tuple) else (result,)
