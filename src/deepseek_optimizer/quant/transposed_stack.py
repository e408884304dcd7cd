"""Stacks of experts' matrices that Transformers stores transposed, as gpt-oss and Llama 4 do.

The parameter of E experts with M matrices each (gate and up, or down) is [E, cols, rows * M]: columns before rows. The rows of
an expert's matrices alternate in gpt-oss; in Llama 4 they are concatenated, matrix after matrix. Biases are [E, rows * M], in
the same order. A packed stack is [E * M, rows, cols], matrix after matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

# How a parameter is stored: False: not transposed; True: transposed, and rows alternate; "concatenated": transposed otherwise.
Transposed = bool | Literal["concatenated"]


def matrices_of(parameter: torch.Tensor, rows: int, transposed: Transposed = True) -> torch.Tensor:
    """A view of the parameter as matrices.

    Args:
        parameter: [E, cols, rows * M].
        rows: of a matrix.
        transposed: which of the transposed forms the parameter has.

    Returns: [E, M, rows, cols].
    """
    if transposed == "concatenated":
        return parameter.unflatten(-1, (-1, rows)).permute(0, 2, 3, 1)
    return parameter.unflatten(-1, (rows, -1)).permute(0, 3, 2, 1)


def stacked_matrices(parameter: torch.Tensor, shape: tuple[int, int, int], transposed: Transposed) -> Sequence[torch.Tensor]:
    """The matrices of a merged parameter, in the order of the packed stack.

    Args:
        parameter: [E, cols, rows * M] if `transposed`, else [E, M * rows, cols].
        shape: count, rows and cols of the stack.
        transposed: the form of the parameter.
    """
    if not transposed:
        return parameter.reshape(shape).unbind()
    return [matrix for expert in matrices_of(parameter, shape[1], transposed) for matrix in expert]


def biases_of(parameter: torch.Tensor, rows: int) -> torch.Tensor:
    """[E, rows * M] -> a view [E, M, rows]."""
    return parameter.unflatten(-1, (rows, -1)).transpose(1, 2)


def parameter_of(matrices: torch.Tensor, transposed: Transposed = True) -> torch.Tensor:
    """The inverse of `matrices_of`: [E, M, rows, cols] -> [E, cols, rows * M], contiguous."""
    if transposed == "concatenated":
        return matrices.permute(0, 3, 1, 2).flatten(2).contiguous()
    return matrices.permute(0, 3, 2, 1).flatten(2).contiguous()
