"""The importance of an MLP's channels: the error of the layer's output without the channel.

A channel j adds h_j w_j to the output, with h_j the channel's activation and w_j its column of the down projection. The squared
error of leaving it out alone is the sum of h_j^2 over the text, times |w_j|^2.
"""

from __future__ import annotations

import torch


def channel_errors(squares: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The squared error without each channel, float64 [I].

    Args:
        squares: sums of the squares of the down projection's inputs, [I].
        down: its weight, [H, I].
    """
    return squares.double() * down.double().square().sum(0)
