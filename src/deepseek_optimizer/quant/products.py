"""Products with packed matrices in plain torch, on any device. Matrices are dequantized a panel of rows at a time, so that no
whole float matrix is in memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import unpack
from .base import TILE_ROWS
from .packed import PackedMatrix
from .tiles import panels


def unpack_rows(matrix: PackedMatrix, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """Returns rows [begin, end) as float32 [end - begin, cols].

    Args:
        begin: a multiple of 16.
        end: None: up to the last row.
    """
    end = matrix.rows if end is None else end
    tiles = matrix.data[begin // TILE_ROWS : -(-end // TILE_ROWS)]
    return unpack(replace(matrix, rows=end - begin, data=tiles))


def linear(x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes x [..., K] @ W.T (+ bias) as float32 [..., N]."""
    flat = x.reshape(-1, matrix.cols).float()
    out = flat.new_empty(flat.shape[0], matrix.rows)
    for begin, end in panels(matrix.rows, matrix.cols):
        torch.matmul(flat, unpack_rows(matrix, begin, end).to(flat.device).t(), out=out[:, begin:end])
    out = out.view(*x.shape[:-1], matrix.rows)
    return out if bias is None else out + bias.float()


def linear_gradient(grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """Computes grad [..., N] @ W as float32 [..., K]: the gradient of `linear` with respect to x."""
    flat = grad.reshape(-1, matrix.rows).float()
    out = flat.new_zeros(flat.shape[0], matrix.cols)
    for begin, end in panels(matrix.rows, matrix.cols):
        out.addmm_(flat[:, begin:end], unpack_rows(matrix, begin, end).to(flat.device))
    return out.view(*grad.shape[:-1], matrix.cols)
