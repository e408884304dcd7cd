"""Stacks that are made of matrices, packed on the host: those of kv_b that absorbed attention reads (see `backends.kv_b`), and
those of grouped products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...quant import pack, products
from ...quant.base import TILE_ROWS
from ...quant.packed import PackedMatrix, PackedStack


def absorbed_stacks(kv_b: PackedMatrix, heads: int, nope: int, v_dim: int) -> tuple[PackedStack, PackedStack]:
    """The stacks of keys, [rank, nope] of each head, and of values, [v_dim, rank]."""
    rows = products.unpack_rows(kv_b, 0, None).unflatten(0, (heads, nope + v_dim))
    repacked = "fp32" if kv_b.format == "fp32" else "bf16"
    keys = _stack(rows[:, :nope].transpose(1, 2), repacked)
    if nope % TILE_ROWS == 0 and v_dim % TILE_ROWS == 0:
        tiles = kv_b.data.unflatten(0, (heads, -1))[:, nope // TILE_ROWS :].contiguous()
        return keys, PackedStack(kv_b.format, heads, v_dim, kv_b.cols, tiles)
    return keys, _stack(rows[:, nope:], repacked)


def grouped_stack(matrix: PackedMatrix, groups: int) -> PackedStack:
    """The matrices of op `grouped_linear`, [rows / groups, cols] each: the matrix's own tiles if a group's rows fill whole
    tiles, else repacked as bf16 (or fp32)."""
    rows = matrix.rows // groups
    if rows % TILE_ROWS == 0:
        return PackedStack(matrix.format, groups, rows, matrix.cols, matrix.data.unflatten(0, (groups, -1)))
    values = products.unpack_rows(matrix, 0, None).unflatten(0, (groups, rows))
    return _stack(values, "fp32" if matrix.format == "fp32" else "bf16")


def _stack(matrices: torch.Tensor, format_name: str) -> PackedStack:
    """Packs matrices [count, rows, cols] in one call, as one matrix in which each begins with a tile."""
    count, rows, cols = matrices.shape
    padded = F.pad(matrices, (0, 0, 0, -rows % TILE_ROWS)).flatten(0, 1).contiguous()
    return PackedStack(format_name, count, rows, cols, pack(padded, format_name).data.unflatten(0, (count, -1)))
