"""Products of FP8 weights with rows in FP8, on tensor cores that multiply E4M3: compute capability 8.9 and later.

Rows are rounded to E4M3 with a scale for each 128 columns, as `reference/scaled_rows.py` defines it. A product of 128 columns
is computed from the codes alone, multiplied by the scales of rows and weights, and added to a sum in fp32; tensor cores, which
add E4M3 products with fewer bits, never add more than 128. A block of weights that shares a scale has these columns, too.

Source: DeepSeek-V3 technical report, section 3.3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..matrices import DeviceTiles
from .codes import codes_of, scale_of
from .tiles import load_scales, tile_place

_ROWS = 16  # of a program of `code_rows`
_GROUP = tl.constexpr(128)  # columns that share a scale


@triton.jit
def row_bytes(groups):
    """Bytes of a row of `code_rows`, a multiple of 16, for matrices with this number of tiles in a row: codes, then scales."""
    return groups * 32 + (groups + 15) // 16 * 16


@triton.jit
def code_rows(x, x_stride, out, rows, columns, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[m] = the codes of x[m] in the order of the bytes of tiles, where columns 1 and 2 of four are exchanged, and a scale
    for each BLOCK of them. Grid (blocks of rows, blocks of columns).

    Args:
        x: float32 [rows, columns], rows `x_stride` apart.
        out: uint8 [rows, row_bytes(groups)].
    """
    m, i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(1) * BLOCK
    column = first + i // 4 * 4 + i % 2 * 2 + i % 4 // 2
    value = tl.load(x + m * x_stride + column, mask=(m < rows) & (column < columns), other=0.0)
    scale = scale_of(tl.max(tl.abs(value), 1, keep_dims=True), "e4m3")
    # Maxima leave NaN out: with one, or with infinity, products must not be finite.
    unusual = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), 1, keep_dims=True)
    scale = tl.where(unusual > 0, float("nan"), scale)
    own = out + m * row_bytes(groups)
    inside = (m < rows) & (first + i < groups * 32)
    tl.store(own + first + i, codes_of(value, scale, "e4m3").to(tl.uint8), mask=inside)
    scales = (own + groups * 32).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scales + tl.program_id(1), scale, mask=m < rows)


@triton.jit
def coded_block(words, k, n, groups, inside, LAYOUT: tl.constexpr):
    """Codes k of rows n, E4M3 [N, K], and the scales of rows n, float32 [N]."""
    place = tile_place((n // 16)[:, None], (k // 4)[None, :], groups, LAYOUT) * 4
    place += (k % 32 // 4 * 64 + k % 4)[None, :] + (n % 16 * 4)[:, None]
    codes = words.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    weights = tl.load(codes + place, mask=inside[:, None] & (k < groups * 32)[None, :], other=0.0)
    scale, _ = load_scales(words, n // 16, tl.min(k, 0) // 4, n % 16, groups, inside, LAYOUT)
    return weights, scale


@triton.jit
def coded_sums(
    coded, source, real, words, up_words, n, outputs, groups, LAYOUT: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `linear_tile.word_sums`, for rows as `code_rows` writes them."""
    own = coded + source * row_bytes(groups)
    codes = own.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    scales = (own + groups * 32).to(tl.pointer_type(tl.float32), bitcast=True)
    inside = n // 16 < (outputs + 15) // 16
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = total
    for group in range(0, (groups + 3) // 4):
        k = group * _GROUP + tl.arange(0, _GROUP)
        rows = tl.load(codes[:, None] + k[None, :], mask=real[:, None] & (k < groups * 32)[None, :], other=0.0)
        scale = tl.load(scales + group, mask=real, other=0.0)
        weights, factor = coded_block(words, k, n, groups, inside, LAYOUT)
        total += tl.dot(rows, tl.trans(weights)) * (scale[:, None] * factor[None, :])
        if GATED:
            weights, factor = coded_block(up_words, k, n, groups, inside, LAYOUT)
            up += tl.dot(rows, tl.trans(weights)) * (scale[:, None] * factor[None, :])
    return total, up


def coded_rows(x: torch.Tensor, columns: int, tiles: DeviceTiles, padded: int = 0) -> torch.Tensor:
    """The first columns of x, float32 [M, >= columns], in FP8; see `code_rows`. Nothing is written to rows M to `padded`."""
    rows, groups, group = len(x), tiles.groups, _GROUP.value
    coded = torch.empty((max(rows, padded), groups * 32 + triton.cdiv(groups, 16) * 16), dtype=torch.uint8, device=x.device)
    code_rows[(triton.cdiv(rows, _ROWS), triton.cdiv(groups * 32, group))](
        x, x.stride(0), coded, rows, columns, groups, ROWS=_ROWS, BLOCK=group, num_warps=4
    )
    return coded
