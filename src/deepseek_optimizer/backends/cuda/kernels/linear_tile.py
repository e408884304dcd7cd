"""Products of many rows with a packed matrix, x W^T, on tensor cores: prefill, and decoding of many sequences.

A program computes BLOCK_M x BLOCK_N outputs. It reads BLOCK_J words of BLOCK_N rows of weights once, and multiplies each of
their parts with the columns of x that belong to it: `per_word` products of BLOCK_J columns. So that these columns are
consecutive, `order_rows` first writes x as [M, per_word, words of a row]: all columns of part 0, then those of part 1, and so
on. It also rounds x to bf16, once and not in every program. Weights are decoded and scaled in fp32, then rounded to bf16.
Matrices in fp32 are multiplied in fp32, without tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gates import NO_GATE, Gate
from ..matrices import DeviceMatrix, DeviceTiles
from .coded_rows import coded_rows, coded_sums
from .epilogue import finished
from .precision import add_product, nearest_bf16
from .tiles import decode, load_codes, load_scales

BLOCK_N, BLOCK_J = 64, 32
# Columns that the words of a block have: more values in registers would not fit. Half as many if decoding takes more registers
# than a shift and a scale.
_MOST_COLUMNS = 256
_FEWEST_WORDS = 16  # of a block: columns of a product on tensor cores
_EXACT = 32  # BLOCK_M and BLOCK_N of fp32 products, whose operands do not fit into registers otherwise
_ORDERED_ROWS, _ORDERED = 16, 64  # rows and words of a program of `order_rows`


@triton.jit
def order_rows(
    x, x_stride, out, rows, columns, row_words, PER_WORD: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, part, j] = x[m, j * PER_WORD + part], zeros beyond the last column. Grid (blocks of rows, PER_WORD, blocks of j).

    Args:
        x: float32 [rows, columns], rows `x_stride` apart.
        out: bf16 if NARROW, otherwise float32, [rows, PER_WORD, row_words].
    """
    m, part = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.program_id(1)
    j = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    column = j * PER_WORD + part
    value = tl.load(x + m * x_stride + column, mask=(m < rows) & (column < columns), other=0.0)
    if NARROW:
        value = nearest_bf16(value)
    place = (m * PER_WORD + part) * row_words + j
    tl.store(out + place, value.to(out.dtype.element_ty), mask=(m < rows) & (j < row_words))


@triton.jit
def weight_block(words, j, n, groups, inside, LAYOUT: tl.constexpr):
    """Rows n of weights at words j: what `load_codes` and `load_scales` return, [J, N] each."""
    tile_row, row = (n // 16)[None, :], (n % 16)[None, :]
    low, high = load_codes(words, tile_row, j[:, None], row, groups, inside, LAYOUT)
    scale, minimum = load_scales(words, tile_row, j[:, None], row, groups, inside, LAYOUT)
    return low, high, scale, minimum


@triton.jit
def weight_values(low, high, scale, minimum, part: tl.constexpr, LAYOUT: tl.constexpr):
    """One part of each word of `weight_block`, float32 [J, N]."""
    value = decode(low, high, part, LAYOUT) * scale
    if LAYOUT.minimum:
        value += minimum
    return value


@triton.jit
def word_sums(
    ordered, source, real, words, up_words, n, outputs, groups, LAYOUT: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Products of some rows with rows n of W, and with GATED of U: float32 [BLOCK_M, BLOCK_N] each; without GATED twice the
    first.

    Args:
        ordered: rows as `order_rows` writes them, [.., per_word, words of a row].
        source: int64 [BLOCK_M], which of them; real: bool [BLOCK_M], False where there is no row.
        words, up_words: the tiles of W and U, see `DeviceTiles`.
        n: [BLOCK_N], numbers of the outputs.
    """
    PER_WORD: tl.constexpr = LAYOUT.per_word
    row_words = groups * LAYOUT.words
    x_rows = ordered + source[:, None] * (PER_WORD * row_words)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = total
    for start in range(0, row_words, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (j < row_words)[:, None] & (n // 16 < (outputs + 15) // 16)[None, :]  # whole tiles, so that loads are wide
        low, high, scale, minimum = weight_block(words, j, n, groups, inside, LAYOUT)
        up_low, up_high, up_scale, up_minimum = low, high, scale, minimum
        if GATED:
            up_low, up_high, up_scale, up_minimum = weight_block(up_words, j, n, groups, inside, LAYOUT)
        for part in tl.static_range(PER_WORD):
            mask = real[:, None] & (j < row_words)[None, :]
            values = tl.load(x_rows + part * row_words + j[None, :], mask=mask, other=0.0)
            total = add_product(total, values, weight_values(low, high, scale, minimum, part, LAYOUT), LAYOUT.narrow)
            if GATED:
                raised = weight_values(up_low, up_high, up_scale, up_minimum, part, LAYOUT)
                up = add_product(up, values, raised, LAYOUT.narrow)
    return total, up


@triton.jit
def tile_sums(
    ordered, source, real, words, up_words, n, outputs, groups, LAYOUT: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """See `word_sums`, or with `LAYOUT.coded` `coded_sums`; `ordered` is what `ordered_rows` writes."""
    if LAYOUT.coded:
        return coded_sums(ordered, source, real, words, up_words, n, outputs, groups, LAYOUT, GATED, BLOCK_M, BLOCK_N)
    else:
        return word_sums(ordered, source, real, words, up_words, n, outputs, groups, LAYOUT, GATED, BLOCK_M, BLOCK_N, BLOCK_J)


@triton.jit
def tile_product(
    ordered, words, up_words, bias, up_bias, out, out_stride, rows, outputs, groups, LAYOUT: tl.constexpr, GATE: tl.constexpr,
    BIASED: tl.constexpr, UP_BIASED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias, or with a gate of that and x U^T + up_bias. Grid (blocks of rows, blocks of outputs):
    programs next to each other read the same weights, which then come from the L2 cache.

    Args:
        ordered: x as `order_rows` writes it, [rows, per_word, words of a row].
        words, up_words: the tiles of W and U, see `DeviceMatrix`.
        bias, up_bias: float32 [outputs], read if BIASED and UP_BIASED.
        out: float32 [rows, outputs], rows `out_stride` apart.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total, up = tile_sums(
        ordered, m.to(tl.int64), m < rows, words, up_words, n, outputs, groups, LAYOUT, GATE.kind != "", BLOCK_M, BLOCK_N,
        BLOCK_J,
    )  # fmt: skip
    value = finished(total, up, bias, up_bias, n, outputs, GATE, BIASED, UP_BIASED)
    tl.store(out + m[:, None].to(tl.int64) * out_stride + n[None, :], value, mask=(m < rows)[:, None] & (n < outputs)[None, :])


def block_rows(rows: int) -> int:
    """BLOCK_M for this number of rows: few rows leave few idle lanes of tensor cores, many read weights less often."""
    return min(64, max(16, triton.next_power_of_2(rows)))


def ordered_rows(x: torch.Tensor, columns: int, tiles: DeviceTiles) -> torch.Tensor:
    """The first columns of x, float32 [M, >= columns], as products with these matrices read them; see `order_rows` and
    `coded_rows`."""
    if tiles.layout.coded:
        return coded_rows(x, columns, tiles)
    rows, layout, row_words = len(x), tiles.layout, tiles.row_words
    ordered = torch.empty(
        (rows, layout.per_word, row_words), dtype=torch.bfloat16 if layout.narrow else torch.float32, device=x.device
    )
    order_rows[(triton.cdiv(rows, _ORDERED_ROWS), layout.per_word, triton.cdiv(row_words, _ORDERED))](
        x, x.stride(0), ordered, rows, columns, row_words, PER_WORD=layout.per_word, NARROW=layout.narrow,
        ROWS=_ORDERED_ROWS, BLOCK=_ORDERED, num_warps=4,
    )  # fmt: skip
    return ordered


def tile_sizes(rows: int, tiles: DeviceTiles, gated: bool) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and BLOCK_J of products of this number of rows. With gate and up, programs have half as many outputs:
    both sums must fit into registers."""
    limit = min(BLOCK_N, tiles.division.block_n) if tiles.layout.narrow else _EXACT
    layout, outputs = tiles.layout, limit // 2 if gated and tiles.layout.narrow else limit
    columns = _MOST_COLUMNS // 2 if layout.minimum or layout.high or layout.codes in ("iq4", "e2m1") else _MOST_COLUMNS
    return {
        "BLOCK_M": min(BLOCK_N if tiles.layout.narrow else _EXACT, block_rows(rows)),
        "BLOCK_N": outputs,
        "BLOCK_J": max(_FEWEST_WORDS, min(BLOCK_J, columns // layout.per_word)),
    }


def launch_tile(
    x: torch.Tensor,
    matrix: DeviceMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    up: DeviceMatrix | None = None,
    up_bias: torch.Tensor | None = None,
    gate: Gate = NO_GATE,
) -> None:
    """See `tile_product`: x float32 [M, K] with M > 0, out float32 [M, N]."""
    rows, sizes, second = len(x), tile_sizes(len(x), matrix, up is not None), matrix if up is None else up
    tile_product[(triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(matrix.rows, sizes["BLOCK_N"]))](
        ordered_rows(x, matrix.cols, matrix), matrix.words, second.words, out if bias is None else bias,
        out if up_bias is None else up_bias, out, out.stride(0), rows, matrix.rows, matrix.groups, LAYOUT=matrix.layout,
        GATE=gate, BIASED=bias is not None, UP_BIASED=up_bias is not None, **sizes, num_warps=matrix.division.tile_warps,
        num_stages=matrix.division.tile_stages,
    )  # fmt: skip
