"""Element-wise ops of two inputs, one of which may have one element per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def pairwise(a, b, out, count, OP: tl.constexpr, BLOCK: tl.constexpr):
    """out = a + b ("add") or silu(a) * b ("swiglu"), float32 [count]. Grid (blocks). The output may be an input."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at, mask=at < count, other=0.0), tl.load(b + at, mask=at < count, other=0.0)
    if OP == "add":
        value = x + y
    else:
        tl.static_assert(OP == "swiglu")
        value = x * tl.sigmoid(x) * y
    tl.store(out + at, value, mask=at < count)


def apply(op: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """See `pairwise`; contiguous tensors of one shape."""
    if out.numel():
        pairwise[(triton.cdiv(out.numel(), _BLOCK),)](a, b, out, out.numel(), OP=op, BLOCK=_BLOCK, num_warps=4)


@triton.jit
def gate_rows(x, gate, out, width, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * sigmoid(gate). Grid (rows, blocks of columns). The output may be x.

    Args:
        x, out: float32 [rows, width].
        gate: float32 like x, or one element per row if SHARED.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    if SHARED:
        factor = tl.load(gate + row)
    else:
        factor = tl.load(gate + row * width + column, mask=mask, other=0.0)
    value = tl.load(x + row * width + column, mask=mask, other=0.0) * tl.sigmoid(factor)
    tl.store(out + row * width + column, value, mask=mask)


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> None:
    """See `gate_rows`."""
    rows, width = x.shape
    if rows:
        gate_rows[(rows, triton.cdiv(width, _BLOCK))](x, gate, out, width, SHARED=gate.shape[1] == 1, BLOCK=_BLOCK, num_warps=4)
