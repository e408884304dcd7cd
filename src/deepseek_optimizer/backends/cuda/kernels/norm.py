"""RMS norms of rows or heads, with the addition of a residual before them, and layer norms.

One program reads its rows (or heads) into registers, which takes one pass over memory: one long row, or several short ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 2048  # of a program, if rows are shorter


@triton.jit
def rms_norm_rows(
    x, delta, weight, total, out, rows, width, eps, ADDED: tl.constexpr, WEIGHTED: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = x + delta if ADDED, otherwise x; out = z / sqrt(mean(z^2) + eps) * weight. Grid (blocks of rows).

    Outputs may be inputs, as each program has read its rows before it writes.

    Args:
        x, delta, total, out: float32 [rows, width], contiguous; z is written to `total` if ADDED.
        weight: float32 [width], read if WEIGHTED; 1 + weight is used if UNIT_OFFSET.
        BLOCK: a power of two >= width.
    """
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    z = tl.load(x + place, mask=inside, other=0.0)
    if ADDED:
        z += tl.load(delta + place, mask=inside, other=0.0)
        tl.store(total + place, z, mask=inside)
    normed = z / tl.sqrt_rn(tl.sum(z * z, 1) / width + eps)[:, None]
    if WEIGHTED:
        factor = tl.load(weight + column, mask=column < width, other=0.0)
        if UNIT_OFFSET:
            factor += 1.0
        normed *= factor[None, :]
    tl.store(out + place, normed, mask=inside)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    *,
    heads: int = 1,
    unit_offset: bool = False,
    delta: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """See `rms_norm_rows`. With `heads`, each of that many equal parts of a row is a row of its own.

    Args:
        x, out: float32 [T, heads * width], contiguous.
        weight: float32 [width].
        delta, total: float32 like x; both or neither.
    """
    width = x.shape[1] // heads
    rows, block = len(x) * heads, triton.next_power_of_2(width)
    if rows:
        most = triton.next_power_of_2(len(x)) * triton.next_power_of_2(heads)  # the same for all steps of a bucket
        block_rows = min(most, max(1, _ELEMENTS // block))
        rms_norm_rows[(triton.cdiv(rows, block_rows),)](
            x, x if delta is None else delta, x if weight is None else weight, x if total is None else total, out, rows, width,
            eps, ADDED=delta is not None, WEIGHTED=weight is not None, UNIT_OFFSET=unit_offset, ROWS=block_rows, BLOCK=block,
            num_warps=min(8, max(1, block_rows * block // 256)),
        )  # fmt: skip


@triton.jit
def layer_norm_rows(x, weight, bias, out, width, eps, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """out = (x - mean) / sqrt(variance + eps) * weight + bias. Grid (rows). The output may be the input.

    Args:
        x, out: float32 [rows, width], contiguous.
        weight, bias: float32 [width]; `bias` is read if BIASED.
        BLOCK: a power of two >= width.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < width
    z = tl.load(x + row * width + column, mask=inside, other=0.0)
    z = tl.where(inside, z - tl.sum(z, 0) / width, 0.0)
    value = z / tl.sqrt_rn(tl.sum(z * z, 0) / width + eps) * tl.load(weight + column, mask=inside, other=0.0)
    if BIASED:
        value += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, value, mask=inside)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
    """See `layer_norm_rows`."""
    rows, width = x.shape
    if rows:
        layer_norm_rows[(rows,)](
            x, weight, x if bias is None else bias, out, width, eps, BIASED=bias is not None,
            BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
