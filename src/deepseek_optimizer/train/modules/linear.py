"""Linear layers, for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.linear import linear


class TrainedLinear(nn.Module):
    """y = x W^T + b with native products; a mixin for `nn.Linear`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Only `nn.Linear` itself: a subclass may store its weight in another form."""
        return type(module) is nn.Linear and module.weight.is_floating_point()

    def forward(self, input: torch.Tensor, op: Callable[[torch.Tensor, torch.Tensor], Any] | None = None) -> Any:
        """[..., K] -> [..., N]; or op(input, weight), for an op that needs the weight gathered (see `gathers`)."""
        return linear(input, self.weight, self.bias) if op is None else op(input, self.weight)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is just the product with its weight, so that an op can use the weight directly."""
    return isinstance(module, TrainedLinear) and module.bias is None and is_untouched(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module has no side effects: no hooks, and no forward on the instance."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__
