"""Element-wise ops of one input or two, one of which may have one element per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gates import NO_GATE, Gate
from .gates import capped, gated, gelu, gelu_erf

_BLOCK = 1024


@triton.jit
def pairwise(a, b, out, count, OP: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr):
    """out = a + b ("add"), a * b ("multiply"), or both joined ("gate"), float32 [count]. Grid (blocks). The output may be an
    input."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at, mask=at < count, other=0.0), tl.load(b + at, mask=at < count, other=0.0)
    if OP == "add":
        value = x + y
    elif OP == "multiply":
        value = x * y
    else:
        tl.static_assert(OP == "gate")
        value = gated(x, y, GATE)
    tl.store(out + at, value, mask=at < count)


def apply(op: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, gate: Gate = NO_GATE) -> None:
    """See `pairwise`; contiguous tensors of one shape."""
    if out.numel():
        pairwise[(triton.cdiv(out.numel(), _BLOCK),)](
            a, b, out, out.numel(), OP=op, GATE=gate, BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip


@triton.jit
def each_element(x, factor, limit, out, count, scale, cap, OP: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks). The output may be x.

    Args:
        x, out: float32 [count].
        factor, limit: float32 [1], read by "scale_by" and "clamp".
        OP: "scale": out = x * scale, with `cap` > 0 cap * tanh of it / cap; "scale_by": x * factor; "clamp": x limited to
            [factor, limit]; "gelu", "gelu_erf", "relu".
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0)
    if OP == "scale":
        value = capped(value * scale, cap)
    elif OP == "scale_by":
        value = value * tl.load(factor)
    elif OP == "clamp":
        low, high = tl.load(factor), tl.load(limit)
        value = tl.where(value < low, low, value)  # NaN stays
        value = tl.where(value > high, high, value)
    elif OP == "relu":
        value = tl.where(value < 0.0, 0.0, value)
    elif OP == "gelu_erf":
        value = gelu_erf(value)
    else:
        tl.static_assert(OP == "gelu")
        value = gelu(value)
    tl.store(out + at, value, mask=at < count)


def each(
    op: str,
    x: torch.Tensor,
    out: torch.Tensor,
    scale: float = 1.0,
    cap: float = 0.0,
    factor: torch.Tensor | None = None,
    limit: torch.Tensor | None = None,
) -> None:
    """See `each_element`; contiguous tensors of one shape."""
    if out.numel():
        each_element[(triton.cdiv(out.numel(), _BLOCK),)](
            x, x if factor is None else factor, x if limit is None else limit, out, out.numel(), float(scale), float(cap),
            OP=op, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


@triton.jit
def scale_rows(x, positions, out, width, beta, length, offset, BLOCK: tl.constexpr):
    """See op `position_scale`. Grid (rows, blocks of columns). The output may be x.

    Args:
        x, out: float32 [rows, width].
        positions: int32 [rows].
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    steps = (tl.load(positions + row) + offset) // length
    factor = 1.0 + beta * tl.log(1.0 + steps.to(tl.float32))
    place = row * width + column
    tl.store(out + place, tl.load(x + place, mask=column < width, other=0.0) * factor, mask=column < width)


def position_scale(
    x: torch.Tensor, positions: torch.Tensor, out: torch.Tensor, beta: float, length: int, offset: int = 0
) -> None:
    """See `scale_rows`."""
    rows, width = x.shape
    if rows:
        grid = rows, triton.cdiv(width, _BLOCK)
        scale_rows[grid](x, positions, out, width, float(beta), length, offset, BLOCK=_BLOCK, num_warps=4)


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
