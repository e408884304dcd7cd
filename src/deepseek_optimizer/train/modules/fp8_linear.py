"""Linear layers in FP8 for training, and the choice of these layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..fp8.backend import Fp8Products
from ..fp8.linear import fp8_linear
from ..ops.linear import linear
from .linear import TrainedLinear

_ROUTERS = ("gate", "router", "score", "classifier")  # last part of the name; routers stay in bf16
_ADAPTERS = "lora_"


class TrainedFp8Linear(nn.Module):
    """y = x W^T + b, in FP8 during training; in evaluation in its own dtype, as in the saved model."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    fp8: Fp8Products

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return TrainedLinear.fits(module)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        if not self.training:
            return linear(input, self.weight, self.bias)
        return fp8_linear(input, self.weight, self.bias, self.fp8)


def excluded_from_fp8(model: Any) -> set[int]:
    """ids of linear layers that stay in bf16: the head, routers, adapters (report, section 3.3.1)."""
    excluded = {id(head)} if (head := _head(model)) is not None else set()
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in _ROUTERS or any(part.startswith(_ADAPTERS) for part in parts):
            excluded.add(id(module))
    return excluded


def _head(model: Any) -> nn.Module | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, nn.Module) else None
