"""Root mean square norms (Zhang and Sennrich, arXiv 1910.07467), in training."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn

from ..kept import Kept
from ..ops.rms_norm import rms_norm, rms_norm_beside


class TrainedNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps); a mixin before Transformers' own class of that form."""

    weight: torch.Tensor
    variance_epsilon: float
    kept: Kept

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """By `variance_epsilon`, which norms of the form (1 + w) do not have, and one argument, which gated norms do not."""
        return (
            hasattr(module, "variance_epsilon")
            and {name: p.ndim for name, p in module.named_parameters()} == {"weight": 1}
            and not list(module.children())
            and len(inspect.signature(type(module).forward).parameters) == 2
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        x, weight, epsilon = hidden_states, self.weight, self.variance_epsilon
        return self.kept.again(rms_norm(x, weight, epsilon), partial(rms_norm, x.detach(), weight.detach(), epsilon))

    def beside(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(forward(x), x), for a block that adds to what it norms."""
        weight, epsilon = self.weight, self.variance_epsilon
        y, same = rms_norm_beside(x, weight, epsilon)
        return self.kept.again(y, partial(rms_norm, x.detach(), weight.detach(), epsilon)), same
