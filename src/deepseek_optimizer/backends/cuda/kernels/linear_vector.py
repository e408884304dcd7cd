"""Products of a few rows with a packed matrix, x W^T: decoding, which reads each weight once and is bound by memory.

One program computes 16 outputs, those of a row of tiles, whose bytes are consecutive in memory: 16 x K weights of one stream.
It decodes BLOCK words of the 16 rows at a time in registers and multiplies them in fp32 with up to four rows of x, which it
reads from the L1 cache. Tensor cores would be idle for 12 of 16 rows, and fp32 needs no rounding of x. Sums of all words of a
thread stay apart until the end, so that the loop has no reduction.

A matrix with few rows has too few programs for all processors of a card. Then its columns are divided into SPLITS parts, whose
sums go to memory, and `finish_splits` adds them in ascending order. The division depends on the shape of the matrix only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import BLOCK
from ..gates import NO_GATE, Gate
from ..layouts import TileLayout
from ..matrices import DeviceMatrix
from .epilogue import finished, launch_finish
from .tiles import decode, load_codes, load_scales


@triton.jit
def tile_row_sums(
    x, x_stride, rows, columns, words, tile_row, groups, begin, end, LAYOUT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, 16]: the products of x's rows with the 16 rows of weights, over words [begin, end)."""
    PER_WORD: tl.constexpr = LAYOUT.per_word
    m, r = tl.arange(0, ROWS), tl.arange(0, 16)
    total = tl.zeros([ROWS, BLOCK, 16], tl.float32)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < end
        low, high = load_codes(words, tile_row, j[:, None], r[None, :], groups, inside[:, None], LAYOUT)
        block = tl.zeros([ROWS, BLOCK, 16], tl.float32)
        x_sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for part in tl.static_range(PER_WORD):
            column = j * PER_WORD + part
            mask = (m < rows)[:, None] & (inside & (column < columns))[None, :]
            values = tl.load(x + m[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
            block += values[:, :, None] * decode(low, high, part, LAYOUT)[None, :, :]
            if LAYOUT.minimum:
                x_sums += values
        if LAYOUT.scale != "":
            scale, minimum = load_scales(words, tile_row, j[:, None], r[None, :], groups, inside[:, None], LAYOUT)
            block *= scale[None, :, :]
            if LAYOUT.minimum:
                block += x_sums[:, :, None] * minimum[None, :, :]
        total += block
    return tl.sum(total, 1)


@triton.jit
def vector_product(
    x, x_stride, words, up_words, bias, up_bias, out, out_stride, partial, rows, outputs, columns, groups, per_split,
    LAYOUT: tl.constexpr, GATE: tl.constexpr, BIASED: tl.constexpr, UP_BIASED: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias, or with a gate of that and x U^T + up_bias. Grid (rows of tiles, SPLITS).

    Args:
        x: float32 [rows, columns], rows `x_stride` apart.
        words, up_words: the tiles of W and U, see `DeviceMatrix`.
        bias, up_bias: float32 [outputs], read if BIASED and UP_BIASED.
        out: float32 [rows, outputs], rows `out_stride` apart; written if SPLITS is 1.
        partial: float32 [1 or 2, SPLITS, rows, outputs], written otherwise.
        per_split: words of a split, a multiple of BLOCK.
    """
    tile_row, split = tl.program_id(0), tl.program_id(1)
    begin = split * per_split
    end = tl.minimum(begin + per_split, groups * LAYOUT.words)
    total = tile_row_sums(x, x_stride, rows, columns, words, tile_row, groups, begin, end, LAYOUT, ROWS, BLOCK)
    up = total
    if GATE.kind != "":
        up = tile_row_sums(x, x_stride, rows, columns, up_words, tile_row, groups, begin, end, LAYOUT, ROWS, BLOCK)
    m, n = tl.arange(0, ROWS), tile_row * 16 + tl.arange(0, 16)
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    if SPLITS == 1:
        value = finished(total, up, bias, up_bias, n, outputs, GATE, BIASED, UP_BIASED)
        tl.store(out + m[:, None] * out_stride + n[None, :], value, mask=mask)
    else:
        place = split * rows * outputs + m[:, None] * outputs + n[None, :]
        tl.store(partial + place, total, mask=mask)
        if GATE.kind != "":
            tl.store(partial + SPLITS * rows * outputs + place, up, mask=mask)


def block_words(rows: int, layout: TileLayout) -> int:
    """BLOCK for this number of rows: half as many words where sums of four rows, or the 16 columns of a word of Q2_K and Q3_K,
    would not fit into registers."""
    return BLOCK if rows <= 2 and layout.per_word < 16 else BLOCK // 2


def launch_vector(
    x: torch.Tensor,
    matrix: DeviceMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    up: DeviceMatrix | None = None,
    up_bias: torch.Tensor | None = None,
    gate: Gate = NO_GATE,
) -> None:
    """See `vector_product`: x float32 [M, K] with 0 < M <= MOST_ROWS, out float32 [M, N]."""
    rows, splits = len(x), matrix.division.splits(matrix.tile_rows, matrix.row_words)
    blocks = triton.cdiv(matrix.row_words, splits * BLOCK)
    second = matrix if up is None else up
    partial = out
    if splits > 1:
        partial = torch.empty((1 if up is None else 2, splits, rows, matrix.rows), dtype=torch.float32, device=x.device)
    vector_product[(matrix.words.shape[0], splits)](
        x, x.stride(0), matrix.words, second.words, x if bias is None else bias, x if up_bias is None else up_bias, out,
        out.stride(0), partial, rows, matrix.rows, matrix.cols, matrix.groups, blocks * BLOCK, LAYOUT=matrix.layout,
        GATE=gate, BIASED=bias is not None, UP_BIASED=up_bias is not None, SPLITS=splits,
        ROWS=triton.next_power_of_2(rows), BLOCK=block_words(rows, matrix.layout), num_warps=matrix.division.vector_warps,
    )  # fmt: skip
    if splits > 1:
        launch_finish(partial, bias, up_bias, gate, out)
