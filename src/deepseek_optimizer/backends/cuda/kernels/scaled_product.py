"""Products of FP8 weights with rows in FP8 by torch's `scaled_mm`, from packed matrices.

Codes of rows and of weights keep the order of the bytes of tiles, where columns 1 and 2 of four are exchanged: in both alike,
which changes no sum. So a matrix in rows needs its words only moved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....quant.scaled_mm import FOUR, multiply, padded_rows
from ..gates import NO_GATE, Gate
from ..matrices import DeviceMatrix
from .coded_rows import coded_rows
from .elementwise import apply
from .tiles import load_codes, load_scales

_BLOCK = 64  # words of 16 rows in a program
_GROUP = 128  # columns and rows that share a scale
_GROUP_WORDS, _GROUP_TILES = tl.constexpr(_GROUP // 4), tl.constexpr(_GROUP // 16)


@triton.jit
def matrix_rows(words, codes, scales, groups, blocks, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """The words of a packed FP8 matrix in rows, and its scales. Grid (rows of tiles, blocks of words).

    Args:
        words: the tiles, see `DeviceMatrix`.
        codes: int32 [rows, groups * 8].
        scales: float32 [rows / 128, blocks], written up to `blocks`: zeros follow those of the matrix.
        blocks: a multiple of four.
    """
    tile_row, r = tl.program_id(0), tl.arange(0, 16)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < groups * LAYOUT.words
    low, _ = load_codes(words, tile_row, j[:, None], r[None, :], groups, inside[:, None], LAYOUT)
    row = (tile_row * 16 + r).to(tl.int64)
    tl.store(codes + row[None, :] * (groups * LAYOUT.words) + j[:, None], low, mask=inside[:, None])
    scale, _ = load_scales(words, tile_row, j, 0, groups, inside, LAYOUT)
    first = (j % _GROUP_WORDS + tile_row % _GROUP_TILES == 0) & (j // _GROUP_WORDS < blocks)
    tl.store(scales + tile_row // _GROUP_TILES * blocks + j // _GROUP_WORDS, scale, mask=first)


def rows_of(matrix: DeviceMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of an FP8 matrix, E4M3 [N, K] in the order of the bytes of tiles, and its scales, float32
    [K / 128 rounded up to a multiple of FOUR, N / 128] in column-major order; N and K are multiples of 128."""
    row_words, blocks = matrix.row_words, triton.cdiv(matrix.cols, _GROUP * FOUR) * FOUR
    codes = torch.empty((matrix.rows, row_words), dtype=torch.int32, device=matrix.words.device)
    scales = torch.empty((matrix.rows // _GROUP, blocks), dtype=torch.float32, device=codes.device)
    matrix_rows[(matrix.tile_rows, triton.cdiv(blocks * _GROUP_WORDS.value, _BLOCK))](
        matrix.words, codes, scales, matrix.groups, blocks, LAYOUT=matrix.layout, BLOCK=_BLOCK, num_warps=4
    )
    return codes.view(torch.float8_e4m3fn), scales.t()


def scaled_rows(x: torch.Tensor, matrix: DeviceMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of x, E4M3 [M', K] in the order of `rows_of`, and their scales, float32 [M', K / 128] in column-major order:
    M' is M rounded up, and nothing is written to the further rows."""
    rows, columns = padded_rows(len(x)), matrix.cols
    coded = coded_rows(x, columns, matrix, rows)
    scales = torch.empty((columns // _GROUP, rows), dtype=torch.float32, device=x.device).t()
    scales.copy_(coded[:, columns:].view(torch.float32)[:, : columns // _GROUP])
    return coded[:, :columns].view(torch.float8_e4m3fn), scales


def launch_scaled(
    x: torch.Tensor,
    matrix: DeviceMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    up: DeviceMatrix | None = None,
    up_bias: torch.Tensor | None = None,
    gate: Gate = NO_GATE,
) -> None:
    """As `launch_tile`: x float32 [M, K] with M > 0, out float32 [M, N], N and K multiples of 128."""
    rows = scaled_rows(x, matrix)
    if up is None:
        _write(rows, matrix, bias, out)
        return
    raised = torch.empty_like(out)
    _write(rows, matrix, bias, out)
    _write(rows, up, up_bias, raised)
    apply("gate", out, raised, out, gate)


def _write(rows: tuple[torch.Tensor, torch.Tensor], matrix: DeviceMatrix, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    product = multiply(*rows, *rows_of(matrix), True, torch.float32)[: len(out)]
    if bias is None:
        out.copy_(product)
    else:
        torch.add(product, bias, out=out)
