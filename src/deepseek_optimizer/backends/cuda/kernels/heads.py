"""Products of every head with a matrix of its own: queries mapped to latents, and sums of latents to values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import MOST_ROWS
from ..matrices import DeviceStack
from .linear_tile import ordered_rows, tile_sizes, tile_sums
from .linear_vector import block_words, tile_row_sums
from .rope import store_as


@triton.jit
def head_vector_product(
    x, x_stride, x_head, words, out, out_stride, out_head, rows, outputs, columns, groups, matrix_words, LAYOUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, h] = W_h x[m, h] for few rows m. Grid (rows of tiles, heads).

    Args:
        x, out: float32; rows are `x_stride` and `out_stride` apart, heads `x_head` and `out_head`.
        words: the tiles of W of the first head, see `DeviceStack`.
        matrix_words: words between two matrices.
    """
    tile_row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tile_row_sums(
        x + head * x_head, x_stride, rows, columns, words + head * matrix_words, tile_row, groups, 0, groups * LAYOUT.words,
        LAYOUT, ROWS, BLOCK,
    )  # fmt: skip
    m, n = tl.arange(0, ROWS), tile_row * 16 + tl.arange(0, 16)
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out + m[:, None] * out_stride + head * out_head + n[None, :], total, mask=mask)


@triton.jit
def head_tile_product(
    ordered, source_stride, head_stride, words, out, out_stride, out_head, rows, outputs, groups, matrix_words,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """As `head_vector_product`, for many rows on tensor cores. Grid (blocks of rows, blocks of outputs, heads).

    Args:
        ordered: the heads of x as `order_rows` writes them, head h of row m at m * source_stride + h * head_stride.
    """
    m, head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = words + head * matrix_words
    total, _ = tile_sums(
        ordered, m.to(tl.int64) * source_stride + head * head_stride, m < rows, matrix, matrix, n, outputs, groups, LAYOUT,
        False, BLOCK_M, BLOCK_N, BLOCK_J,
    )  # fmt: skip
    place = out + m[:, None].to(tl.int64) * out_stride + head * out_head + n[None, :]
    store_as(place, total, mask=(m < rows)[:, None] & (n < outputs)[None, :])


class HeadInputs:
    """The inputs of products of all heads, prepared once for products with some of the heads.

    Args:
        x: float32 [T, heads, >= columns], contiguous; the first columns of each head are read.
        stack: the matrices of all heads that are multiplied with it.
    """

    def __init__(self, x: torch.Tensor, stack: DeviceStack) -> None:
        self._x = x
        self._ordered = ordered_rows(x.flatten(0, 1), stack.cols, stack) if len(x) > MOST_ROWS else None

    def products(self, stack: DeviceStack, first: int, out: torch.Tensor, first_matrix: int = 0) -> None:
        """out[m, i] = W_h x[m, first + i] with the matrix of head h = first_matrix + first + i.

        Args:
            out: float32 [T, heads, rows], contiguous in its last dimension.
        """
        rows, heads = out.shape[:2]
        words = stack.words[first_matrix + first :]
        if self._ordered is None:
            x = self._x[:, first:]
            head_vector_product[(stack.tile_rows, heads)](
                x, x.stride(0), x.stride(1), words, out, out.stride(0), out.stride(1), rows, stack.rows, stack.cols,
                stack.groups, stack.matrix_words, LAYOUT=stack.layout, ROWS=triton.next_power_of_2(rows),
                BLOCK=block_words(rows, stack.layout), num_warps=4,
            )  # fmt: skip
        else:
            sizes = tile_sizes(rows, stack, gated=False)
            grid = triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(stack.rows, sizes["BLOCK_N"]), heads
            head_tile_product[grid](
                self._ordered[first:], self._x.shape[1], 1, words, out, out.stride(0), out.stride(1), rows, stack.rows,
                stack.groups, stack.matrix_words, LAYOUT=stack.layout, **sizes, num_warps=4,
                num_stages=2,
            )  # fmt: skip
