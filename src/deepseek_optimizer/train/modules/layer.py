"""Decoder layers as in Llama, for training: attention and feed-forward block with residual connections."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from ...models.families import traits
from ..ops.add import add
from .linear import is_untouched
from .mtp_layer import MTP_CHILDREN
from .norm import TrainedNorm

_CHILDREN: Final = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class TrainedLayer(nn.Module):
    """y = x + attention(norm(x)); result = y + mlp(norm(y)). A mixin for Transformers' class of that form."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    @staticmethod
    def fits(module: nn.Module) -> bool:
        config = getattr(getattr(module, "self_attn", None), "config", None)
        children = {name for name, _ in module.named_children()} - MTP_CHILDREN
        return traits(config).plain_residuals and children == _CHILDREN

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        normed, residual = _norm(self.input_layernorm, hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        normed, residual = _norm(self.post_attention_layernorm, add(residual, attended))
        return add(residual, self.mlp(normed))


def _norm(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.with_residual(x) if isinstance(norm, TrainedNorm) and is_untouched(norm) else (norm(x), x)
