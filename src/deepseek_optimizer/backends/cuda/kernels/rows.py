"""Rows by index, of packed embeddings and of values, and rows of two values side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..matrices import DeviceMatrix
from .tiles import decode, load_codes, load_scales

_ROWS, _BLOCK = 16, 64  # rows, and words or columns, of a program


@triton.jit
def embedding_rows(
    ids, words, out, tokens, columns, groups, scale, LAYOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[t] = scale * W[ids[t]]. Grid (blocks of tokens, blocks of words). A row's words are 16 apart.

    Args:
        ids: int32 [T].
        words: the tiles of W, see `DeviceMatrix`.
        out: float32 [T, columns], contiguous.
    """
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    index = tl.load(ids + token, mask=token < tokens, other=0)
    inside = (token < tokens) & (j < groups * LAYOUT.words)
    low, high = load_codes(words, index // 16, j, index % 16, groups, inside, LAYOUT)
    factor, minimum = load_scales(words, index // 16, j, index % 16, groups, inside, LAYOUT)
    PER_WORD: tl.constexpr = LAYOUT.per_word
    for part in tl.static_range(PER_WORD):
        column = j * PER_WORD + part
        value = decode(low, high, part, LAYOUT) * factor
        if LAYOUT.minimum:
            value += minimum
        tl.store(out + token * columns + column, value * scale, mask=(token < tokens) & (column < columns))


def embedding(ids: torch.Tensor, table: DeviceMatrix, scale: float, out: torch.Tensor) -> None:
    """See `embedding_rows`."""
    embedding_rows[(triton.cdiv(len(ids), _ROWS), triton.cdiv(table.row_words, _BLOCK))](
        ids, table.words, out, len(ids), table.cols, table.groups, scale, LAYOUT=table.layout, ROWS=_ROWS,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def copy_rows(index, x, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = x[index[r]], float32 [rows, width], contiguous; index: int32 [rows]. Grid (blocks of rows, and of columns)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    source = tl.load(index + row, mask=row < rows, other=0).to(tl.int64)
    inside = (row < rows) & (column < width)
    tl.store(out + row * width + column, tl.load(x + source * width + column, mask=inside, other=0.0), mask=inside)


def select_rows(index: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """See `copy_rows`."""
    rows, width = out.shape
    if rows:
        grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, _BLOCK)
        copy_rows[grid](index, x, out, rows, width, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4)


@triton.jit
def copy_columns(
    x, out, rows, width, GROUPS: tl.constexpr, BEGIN: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[r] = COUNT elements from BEGIN on of each of GROUPS equal parts of x[r]: float32 [rows, width], [rows, GROUPS *
    COUNT], contiguous. Grid (blocks of rows, and of columns)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    source = column // COUNT * (width // GROUPS) + BEGIN + column % COUNT
    inside = (row < rows) & (column < GROUPS * COUNT)
    value = tl.load(x + row * width + source, mask=inside, other=0.0)
    tl.store(out + row * (GROUPS * COUNT) + column, value, mask=inside)


def columns(x: torch.Tensor, out: torch.Tensor, groups: int, begin: int, end: int) -> None:
    """See `copy_columns`."""
    rows, width = out.shape
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, _BLOCK)
    copy_columns[grid](
        x, out, rows, x.shape[1], GROUPS=groups, BEGIN=begin, COUNT=end - begin, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit
def join_rows(a, b, out, rows, first, second, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = a[r], then b[r]: float32 [rows, first], [rows, second], [rows, first + second], contiguous. Grid (blocks of
    rows, and of columns)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    from_a = (row < rows) & (column < first)
    from_b = (row < rows) & (column >= first) & (column < first + second)
    place = out + row * (first + second) + column
    tl.store(place, tl.load(a + row * first + column, mask=from_a, other=0.0), mask=from_a)
    tl.store(place, tl.load(b + row * second + column - first, mask=from_b, other=0.0), mask=from_b)


def concat(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """See `join_rows`."""
    rows, width = out.shape
    if rows:
        grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, _BLOCK)
        join_rows[grid](a, b, out, rows, a.shape[1], b.shape[1], ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4)
