"""Products with packed matrices: chooses the kernel, or an alternative to it, by the number of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..division import MOST_ROWS
from ..gates import SILU, Gate
from ..matrices import DeviceMatrix
from .elementwise import apply
from .linear_tile import launch_tile
from .linear_vector import launch_vector


def linear(x: torch.Tensor, matrix: DeviceMatrix, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x W^T + bias: x float32 [M, K], out float32 [M, N], bias float32 [N]."""
    if len(x):
        launch_for(len(x), matrix)(x, matrix, bias, out)


def gate_up(
    x: torch.Tensor,
    gate: DeviceMatrix,
    up: DeviceMatrix,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
    joined: Gate = SILU,
) -> None:
    """out = x G^T + b_g and x U^T + b_u, joined, for matrices of one shape: in one kernel if they have one format."""
    if gate.format != up.format:
        raised = torch.empty_like(out)
        linear(x, gate, biases[0], out)
        linear(x, up, biases[1], raised)
        apply("gate", out, raised, out, joined)
    elif len(x):
        launch_for(len(x), gate, up)(x, gate, biases[0], out, up, biases[1], joined)


def launch_for(rows: int, *matrices: DeviceMatrix) -> Callable[..., None]:
    """What computes products of this number of rows with a matrix, or with two matrices of one format."""
    if rows <= MOST_ROWS:
        return launch_vector
    for chosen in matrices[0].alternatives:
        if chosen.takes(rows, *(matrix.shape_of_product for matrix in matrices)):
            return chosen.alternative.launch
    return launch_tile
