"""Rows by index, of packed embeddings and of values, rows of two values side by side, and some columns of rows."""

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


@triton.jit
def copy_columns(x, out, rows, width, part, begin, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements [begin, begin + count) of each `part` elements of a row. Grid (blocks of rows, and of columns of `out`).

    Args:
        x: float32 [rows, n * part]; out: float32 [rows, width] with width = n * count.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < width)
    source = x + row * (width // count * part) + column // count * part + begin + column % count
    tl.store(out + row * width + column, tl.load(source, mask=inside, other=0.0), mask=inside)


def columns(x: torch.Tensor, out: torch.Tensor, groups: int, begin: int, end: int) -> None:
    """out = elements [begin, end) of each of the `groups` equal parts of x's rows; see `copy_columns`."""
    rows, width = out.shape
    if rows:
        grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, _BLOCK)
        copy_columns[grid](
            x, out, rows, width, x.shape[1] // groups, begin, end - begin, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip
