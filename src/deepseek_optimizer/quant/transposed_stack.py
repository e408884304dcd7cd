"""Stacks of experts' matrices that Transformers stores transposed, as gpt-oss and Llama 4 do.

The parameter of E experts with M matrices each (gate and up, or down) is [E, cols, rows * M]: columns before rows. The rows of
an expert's matrices alternate in gpt-oss; in Llama 4 they are concatenated, matrix after matrix. Biases are [E, rows * M], in
the same order. A packed stack is [E * M, rows, cols], matrix after matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

# How a parameter is stored. "rows": not transposed; "columns": transposed, matrix after matrix; "interleaved": transposed, and
# the rows of an expert's matrices alternate. A single matrix is the same in the last two.
StackLayout = Literal["rows", "columns", "interleaved"]


def matrices_of(parameter: torch.Tensor, rows: int, layout: StackLayout) -> torch.Tensor:
    """A view of the parameter as matrices.

    Args:
        parameter: [E, cols, rows * M].
        rows: of a matrix.
        layout: "columns" or "interleaved".

    Returns: [E, M, rows, cols].
    """
    if layout == "columns":
        return parameter.unflatten(-1, (-1, rows)).permute(0, 2, 3, 1)
    return parameter.unflatten(-1, (rows, -1)).permute(0, 3, 2, 1)


def stacked_matrices(parameter: torch.Tensor, shape: tuple[int, int, int], layout: StackLayout) -> Sequence[torch.Tensor]:
    """The matrices of a merged parameter, in the order of the packed stack.

    Args:
        parameter: [E, M * rows, cols] in the layout "rows", else [E, cols, rows * M].
        shape: count, rows and cols of the stack.
        layout: how the parameter is stored.
    """
    if layout == "rows":
        return parameter.reshape(shape).unbind()
    return [matrix for expert in matrices_of(parameter, shape[1], layout) for matrix in expert]


def biases_of(parameter: torch.Tensor, rows: int) -> torch.Tensor:
    """[E, rows * M] -> a view [E, M, rows]."""
    return parameter.unflatten(-1, (rows, -1)).transpose(1, 2)


def parameter_of(matrices: torch.Tensor, layout: StackLayout) -> torch.Tensor:
    """The inverse of `matrices_of`: [E, M, rows, cols] -> [E, cols, rows * M], contiguous."""
    if layout == "columns":
        return matrices.permute(0, 3, 1, 2).flatten(2).contiguous()
    return matrices.permute(0, 3, 2, 1).flatten(2).contiguous()
