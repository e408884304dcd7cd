"""Parts of matrices: some rows or columns, with the bits that they have in the whole matrix."""

from __future__ import annotations

import torch

from .base import PANEL_ROWS, TILE_COLS, TILE_ROWS
from .blocks import SUPERBLOCK
from .kquants import BLOCK_FORMATS
from .nested import NESTED, columns
from .packed import PackedMatrix, PackedStack
from .tiles import empty_stack, empty_tiles

Span = tuple[int, int]


def part_units(format_name: str) -> tuple[int, int]:
    """Numbers of rows and columns that a part of a matrix in this format begins at a multiple of."""
    if format_name == "fp8":  # scales of blocks of 128 x 128
        return PANEL_ROWS, PANEL_ROWS
    superblocks = any(f.superblock for f in BLOCK_FORMATS if f.name == format_name)
    return TILE_ROWS, SUPERBLOCK if superblocks else TILE_COLS


def tile_columns(tiles: torch.Tensor, format_name: str, begin: int, end: int) -> torch.Tensor:
    """Columns of tiles: of uint8 [..., t, g, tile_bytes] tiles [begin, end) of each row; a view, unless the format has parts of
    tiles at the end of a row."""
    if format_name in NESTED:
        return columns(tiles, begin, end)
    return tiles[..., begin:end, :]


def packed_part(matrix: PackedMatrix, rows: Span | None = None, cols: Span | None = None) -> PackedMatrix:
    """Rows [begin, end) and columns [begin, end) of a packed matrix; None: all.

    Rows alone are a view of its tiles; with columns, tiles are copied. Of a mapped matrix, only these tiles are read.

    Args:
        matrix: with its columns in the model's order.
        rows, cols: begin at multiples of `part_units`; they end at such, or with the matrix.

    Raises:
        ValueError: they do not.
    """
    row_unit, col_unit = part_units(matrix.format)
    if matrix.order is not None:
        raise ValueError("the matrix has its columns in another order")
    (top, bottom), (left, right) = rows or (0, matrix.rows), cols or (0, matrix.cols)
    for (begin, end), size, unit in (((top, bottom), matrix.rows, row_unit), ((left, right), matrix.cols, col_unit)):
        if begin % unit or not 0 <= begin < end <= size or (end % unit and end != size):
            raise ValueError(f"[{begin}, {end}) of {size} is not a part of {matrix.format}, whose blocks have {unit}")
    tiles = matrix.data[top // TILE_ROWS : -(-bottom // TILE_ROWS)]
    if cols is not None:
        taken = tile_columns(tiles, matrix.format, left // TILE_COLS, -(-right // TILE_COLS))
        tiles = empty_tiles(bottom - top, right - left, matrix.data.shape[-1]).copy_(taken)
    return PackedMatrix(matrix.format, bottom - top, right - left, tiles)


def stack_part(
    stack: PackedStack, matrices: Span | None = None, rows: Span | None = None, cols: Span | None = None
) -> PackedStack:
    """Some matrices of a stack, and of each of them rows [begin, end) and columns [begin, end); None: all.

    Matrices alone are a view; otherwise tiles are copied. Of a mapped stack, only these tiles are read.

    Raises:
        ValueError: as in `packed_part`.
    """
    begin, end = matrices or (0, stack.count)
    if not 0 <= begin < end <= stack.count:
        raise ValueError(f"[{begin}, {end}) is not a part of a stack of {stack.count} matrices")
    data = stack.data[begin:end]
    if rows is None and cols is None:
        return PackedStack(stack.format, end - begin, stack.rows, stack.cols, data)
    parts = [packed_part(stack.matrix(i), rows, cols) for i in range(begin, end)]
    out = empty_stack(end - begin, *parts[0].shape, data.shape[-1])
    for tiles, part in zip(out, parts, strict=True):
        tiles.copy_(part.data)
    return PackedStack(stack.format, end - begin, *parts[0].shape, out)


def part_of(
    weight: PackedMatrix | torch.Tensor, rows: Span | None = None, cols: Span | None = None
) -> PackedMatrix | torch.Tensor:
    """The same of a packed matrix, or of a dense matrix or vector, of which it is a view."""
    if isinstance(weight, PackedMatrix):
        return packed_part(weight, rows, cols)
    part = weight if rows is None else weight[slice(*rows)]
    return part if cols is None else part[:, slice(*cols)]
