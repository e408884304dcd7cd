"""What follows the sums of a product: biases, and the gate of two products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gates import Gate
from .gates import gated

_BLOCK = 256


@triton.jit
def finished(
    total, up, bias, up_bias, n, outputs, GATE: tl.constexpr, BIASED: tl.constexpr, UP_BIASED: tl.constexpr
):  # fmt: skip
    """total + bias, or with a gate both joined by it: total + bias, and up + up_bias.

    Args:
        total, up: float32 [M, N].
        n: [N], numbers of the outputs, which index the biases.
    """
    if BIASED:
        total += tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
    if GATE.kind != "":
        if UP_BIASED:
            up += tl.load(up_bias + n, mask=n < outputs, other=0.0)[None, :]
        total = gated(total, up, GATE)
    return total


@triton.jit
def finish_splits(
    partial, bias, up_bias, out, out_stride, rows, outputs, SPLITS: tl.constexpr, GATE: tl.constexpr, BIASED: tl.constexpr,
    UP_BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of splits in ascending order, and finishes them. Grid (rows, blocks of outputs).

    Args:
        partial: float32 [1 or 2, SPLITS, rows, outputs].
        out: float32 [rows, outputs], rows `out_stride` apart.
    """
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = partial + row * outputs + n[None, :]
    total = tl.zeros([1, BLOCK], tl.float32)
    up = total
    for split in tl.static_range(SPLITS):
        total += tl.load(place + split * rows * outputs, mask=(n < outputs)[None, :], other=0.0)
        if GATE.kind != "":
            up += tl.load(place + (SPLITS + split) * rows * outputs, mask=(n < outputs)[None, :], other=0.0)
    value = finished(total, up, bias, up_bias, n, outputs, GATE, BIASED, UP_BIASED)
    tl.store(out + row * out_stride + n[None, :], value, mask=(n < outputs)[None, :])


def launch_finish(
    partial: torch.Tensor, bias: torch.Tensor | None, up_bias: torch.Tensor | None, gate: Gate, out: torch.Tensor
) -> None:
    """See `finish_splits`."""
    _, splits, rows, outputs = partial.shape
    finish_splits[(rows, triton.cdiv(outputs, _BLOCK))](
        partial, partial if bias is None else bias, partial if up_bias is None else up_bias, out, out.stride(0), rows, outputs,
        SPLITS=splits, GATE=gate, BIASED=bias is not None, UP_BIASED=up_bias is not None, BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip
