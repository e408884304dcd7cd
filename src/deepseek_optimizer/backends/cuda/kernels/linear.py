"""Products with packed matrices: chooses the kernel by the number of rows."""

from __future__ import annotations

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
        launch = launch_vector if len(x) <= MOST_ROWS else launch_tile
        launch(x, matrix, bias, out)


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
        launch = launch_vector if len(x) <= MOST_ROWS else launch_tile
        launch(x, gate, biases[0], out, up, biases[1], joined)
