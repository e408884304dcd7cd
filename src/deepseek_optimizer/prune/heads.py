"""The importance of attention heads: the error of the layer's output without the head.

A unit is a key head with the query heads that read it, or a single head of latent attention. It adds W_u x_u to the output,
with x_u the attention's result and W_u its columns of the output projection. The squared error of leaving it out alone is the
trace of W_u M_u W_u^T, with M_u the sum of x_u x_u^T over the text.
"""

from __future__ import annotations

import torch


def head_errors(moments: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The squared error without each unit, float64 [U].

    Args:
        moments: sums of x_u x_u^T, [U, w, w].
        output: the output projection's weight, [H, U w].
    """
    units, width, _ = moments.shape
    columns = output.double().reshape(-1, units, width)
    return torch.einsum("hui,uij,huj->u", columns, moments.double(), columns)


def moments_of(x: torch.Tensor, units: int) -> torch.Tensor:
    """Sum of x_u x_u^T over rows x, float [..., U w]: float32 [U, w, w]."""
    rows = x.detach().float().reshape(-1, units, x.shape[-1] // units).transpose(0, 1)
    return rows.transpose(1, 2) @ rows
