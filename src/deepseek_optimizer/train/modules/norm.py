"""Root mean square norms (Zhang and Sennrich, arXiv 1910.07467), for training."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn

from ...integration.training.modules import norm_keeps_dtype
from ..ops.rms_norm import rms_norm, rms_norm_of_dtype, rms_norm_with_residual
from ..saved_activations import SavedActivations
from ..shards import gathers


class TrainedNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps); a mixin for Transformers' class of that form."""

    weight: torch.Tensor
    variance_epsilon: float
    saved: SavedActivations

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Recognized by `variance_epsilon`, which norms with a weight of 1 + w lack, and a single argument, unlike gated
        norms."""
        return (
            hasattr(module, "variance_epsilon")
            and {name: p.ndim for name, p in module.named_parameters()} == {"weight": 1}
            and not list(module.children())
            and len(inspect.signature(type(module).forward).parameters) == 2
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        x, weight, epsilon = hidden_states, self.weight, self.variance_epsilon
        norm = rms_norm_of_dtype if norm_keeps_dtype(self) else rms_norm
        if x.dtype != weight.dtype and norm is rms_norm:  # some classes return the input's dtype, others that of the product
            result: torch.Tensor = super().forward(x)
            return result
        if gathers(self):  # the weight is not there when other modules' backward passes would recompute the result
            return norm(x, weight, epsilon)
        return self.saved.recomputable(norm(x, weight, epsilon), partial(norm, x.detach(), weight.detach(), epsilon))

    def with_residual(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(forward(x), x), for a block with a residual connection: the gradients of x are summed in the norm's backward."""
        weight, epsilon = self.weight, self.variance_epsilon
        y, residual = rms_norm_with_residual(x, weight, epsilon)
        return self.saved.recomputable(y, partial(rms_norm, x.detach(), weight.detach(), epsilon)), residual
