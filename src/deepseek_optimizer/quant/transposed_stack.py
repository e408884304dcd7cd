"""Stacks of experts' matrices that Transformers stores transposed, as gpt-oss does.

The parameter of E experts with M matrices each (gate and up, or down) is [E, cols, rows * M]: columns before rows, and the rows
of an expert's matrices alternate. Biases are [E, rows * M], in the same order. A packed stack is [E * M, rows, cols], matrix
after matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def matrices_of(parameter: torch.Tensor, rows: int) -> torch.Tensor:
    """A view of the parameter as matrices.

    Args:
        parameter: [E, cols, rows * M].
        rows: of a matrix.

    Returns: [E, M, rows, cols].
    """
    return parameter.unflatten(-1, (rows, -1)).permute(0, 3, 2, 1)


def stacked_matrices(parameter: torch.Tensor, shape: tuple[int, int, int], transposed: bool) -> Sequence[torch.Tensor]:
    """The matrices of a merged parameter, in the order of the packed stack.

    Args:
        parameter: [E, cols, rows * M] if `transposed`, else [E, M * rows, cols].
        shape: count, rows and cols of the stack.
        transposed: whether the parameter has the form that this module describes.
    """
    if not transposed:
        return parameter.reshape(shape).unbind()
    return [matrix for expert in matrices_of(parameter, shape[1]) for matrix in expert]


def biases_of(parameter: torch.Tensor, rows: int) -> torch.Tensor:
    """[E, rows * M] -> a view [E, M, rows]."""
    return parameter.unflatten(-1, (rows, -1)).transpose(1, 2)


def parameter_of(matrices: torch.Tensor) -> torch.Tensor:
    """The inverse of `matrices_of`: [E, M, rows, cols] -> [E, cols, rows * M], contiguous."""
    return matrices.permute(0, 3, 2, 1).flatten(2).contiguous()
