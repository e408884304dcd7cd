"""Linear layers, in training."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.linear import linear


class TrainedLinear(nn.Module):
    """y = x W^T + b, with gradients by the package's own product; a mixin before `nn.Linear`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Only `nn.Linear` itself: a subclass may hold its weight in another form."""
        return type(module) is nn.Linear and module.weight.is_floating_point()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return linear(input, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is no more than the product with its weight, so that an op may take the weight alone."""
    return isinstance(module, TrainedLinear) and module.bias is None and is_untouched(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody waits for a module to be called."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__
