"""Patches of a picture in a grid: heads with the terms of relative positions, and padding (`graph/ops/grids.py`).

The place of a row in the grid is among the positions of the step, int32 [3, T]: time, height, width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .precision import add_product

_HEADS = 16  # of a program of `extend_queries`, which reads the tables once for all of them
_DISTANCES = 16  # of a product: operands are in registers
_ROWS, _BLOCK = 16, 64  # rows and columns of a program of the others


@triton.jit
def write_terms(
    rows, mask, table, place, count, out, offset, HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[h, offset + n] = x_h . table[place - n + count - 1] for n < count.

    Args:
        rows: float32 [HEADS, HEAD_BLOCK], the heads of a row of x. mask: bool [HEADS].
        table: float32 [2 * count - 1, HEAD].
        out: pointers to the result's heads, [HEADS].
    """
    d = tl.arange(0, HEAD_BLOCK)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = (d < HEAD)[:, None] & (n < count)[None, :]
        columns = tl.load(table + (place - n + count - 1)[None, :] * HEAD + d[:, None], mask=inside, other=0.0)
        terms = add_product(tl.zeros([HEADS, BLOCK], tl.float32), rows, columns, False)
        tl.store(out[:, None] + offset + n[None, :], terms, mask=mask[:, None] & (n < count)[None, :])


@triton.jit
def extend_queries(
    x, places, by_row, by_col, out, tokens, heads, grid_rows, grid_cols, width, scale, HEADS: tl.constexpr, HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See op `grid_queries`. Grid (rows, blocks of heads).

    Args:
        x: float32 [tokens, heads * HEAD]; out: [tokens, heads * width].
        places: int32 [3, tokens].
        by_row, by_col: float32 [2 * grid_rows - 1, HEAD], [2 * grid_cols - 1, HEAD].
    """
    row, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HEAD_BLOCK)
    inside = (h < heads)[:, None] & (d < HEAD)[None, :]
    rows = tl.load(x + (row * heads + h)[:, None] * HEAD + d[None, :], mask=inside, other=0.0)
    target = out + (row * heads + h) * width
    tl.store(target[:, None] + d[None, :], rows * scale, mask=inside)
    i, j = tl.load(places + tokens + row), tl.load(places + 2 * tokens + row)
    write_terms(rows, h < heads, by_row, i, grid_rows, target, HEAD, HEADS, HEAD, HEAD_BLOCK, BLOCK)
    write_terms(rows, h < heads, by_col, j, grid_cols, target, HEAD + grid_rows, HEADS, HEAD, HEAD_BLOCK, BLOCK)
    for start in range(HEAD + grid_rows + grid_cols, width, BLOCK):
        rest = start + tl.arange(0, BLOCK)
        tl.store(target[:, None] + rest[None, :], 0.0, mask=(h < heads)[:, None] & (rest < width)[None, :])


def grid_queries(
    x: torch.Tensor,
    places: torch.Tensor,
    by_row: torch.Tensor,
    by_col: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    scale: float,
) -> None:
    """See `extend_queries`."""
    tokens, head, width = len(x), x.shape[1] // heads, out.shape[1] // heads
    sizes = [(len(table) + 1) // 2 for table in (by_row, by_col)]
    if tokens:
        extend_queries[(tokens, triton.cdiv(heads, _HEADS))](
            x, places, by_row, by_col, out, tokens, heads, *sizes, width, float(scale), HEADS=_HEADS, HEAD=head,
            HEAD_BLOCK=max(16, triton.next_power_of_2(head)), BLOCK=_DISTANCES, num_warps=4,
        )  # fmt: skip


@triton.jit
def extend_keys(
    x, places, out, tokens, total, head, width, grid_rows, grid_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """See op `grid_keys`. Grid (blocks of rows, blocks of columns of `out`).

    Args:
        x: float32 [tokens, n * head]; out: [tokens, total] with total = n * width.
        places: int32 [3, tokens].
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside, d = (row < tokens) & (column < total), column % width
    own = tl.load(x + row * (total // width * head) + column // width * head + d, mask=inside & (d < head), other=0.0)
    i = tl.load(places + tokens + row, mask=row < tokens, other=0)
    j = tl.load(places + 2 * tokens + row, mask=row < tokens, other=0)
    at_place = (d == head + i) | (d == head + grid_rows + j)
    tl.store(out + row * total + column, tl.where(at_place, 1.0, own), mask=inside)


def grid_keys(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor, heads: int, grid_rows: int, grid_cols: int) -> None:
    """See `extend_keys`."""
    tokens, total = out.shape
    if tokens:
        extend_keys[(triton.cdiv(tokens, _ROWS), triton.cdiv(total, _BLOCK))](
            x, places, out, tokens, total, x.shape[1] // heads, total // heads, grid_rows, grid_cols, ROWS=_ROWS, BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def clear_padding(x, times, out, tokens, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = x, zeros in rows whose time is not 0. Grid (blocks of rows, and of columns). The output may be x.

    Args:
        x, out: float32 [tokens, width].
        times: int32 [tokens].
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < tokens) & (column < width)
    real = inside & (tl.load(times + row, mask=row < tokens, other=1) == 0)
    tl.store(out + row * width + column, tl.load(x + row * width + column, mask=real, other=0.0), mask=inside)


def zero_padding(x: torch.Tensor, times: torch.Tensor, out: torch.Tensor) -> None:
    """See `clear_padding`."""
    tokens, width = x.shape
    if tokens:
        grid = triton.cdiv(tokens, _ROWS), triton.cdiv(width, _BLOCK)
        clear_padding[grid](x, times, out, tokens, width, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4)
