"""Attention of DeepSeek-V4 in training: over a window, and over compressed entries in some types of layers.

Projections, norms and compressors are called as modules, so they may be adapters or have packed weights. Which entries a query
attends to is decided by Transformers' compressors.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from ...integration.compat import CACHE_NAMES, outputs_are_captured
from ...integration.training.modules import attention_name
from ..ops.grouped_columns import grouped_columns
from ..ops.shared_attention import shared_attention
from ..ops.turn import normed_and_turned, turn

_CHILDREN: Final = {"q_a_proj", "q_a_norm", "q_b_proj", "q_b_norm", "kv_proj", "kv_norm", "o_a_proj", "o_b_proj"}


class TrainedCompressedAttention(nn.Module):
    """Forward of compressed attention; a mixin for Transformers' class, which still handles calls with a cache, attention
    functions other than `eager`, dropout, and requests for attention weights."""

    q_a_proj: nn.Module
    q_a_norm: nn.Module
    q_b_proj: nn.Module
    q_b_norm: Any
    kv_proj: nn.Module
    kv_norm: nn.Module
    o_a_proj: nn.Module
    o_b_proj: nn.Module
    compressor: nn.Module | None
    sinks: torch.Tensor
    rope_layer_type: str
    head_dim: int
    scaling: float
    attention_dropout: float
    layer_idx: int
    config: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return {name for name, _ in module.named_children()} >= _CHILDREN and hasattr(module, "sinks")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """hidden_states [B, S, H] -> ([B, S, H], None)."""
        if not self._is_native(attention_mask, kwargs):
            where = {"position_embeddings": position_embeddings, "position_ids": position_ids, "attention_mask": attention_mask}
            return super().forward(hidden_states=hidden_states, **where, **kwargs)
        cos, sin = position_embeddings[self.rope_layer_type]
        latent = self.q_a_norm(self.q_a_proj(hidden_states))
        query = self.q_b_proj(latent).unflatten(-1, (-1, self.head_dim))
        query = normed_and_turned(query, cos, sin, self.q_b_norm.eps)
        rows = turn(self.kv_norm(self.kv_proj(hidden_states))[:, :, None], cos, sin)[:, :, 0]
        masks: list[Any] = [attention_mask]
        if self.compressor is not None:
            entries, seen = self.compressor(hidden_states, latent, position_ids, None, self.layer_idx)
            if entries.shape[2]:
                rows = torch.cat((rows, entries[:, 0].to(rows.dtype)), 1)
                masks.append(rows.new_zeros(1, 1, query.shape[1], entries.shape[2]) if seen is None else seen)
        attended = turn(shared_attention(query, rows, masks, self.sinks, self.scaling), cos, -sin)
        grouped = attended.flatten(2).unflatten(-1, (self.config.o_groups, -1))
        return self.o_b_proj(self.o_a_proj(grouped).flatten(2)), None

    def _is_native(self, mask: Any, kwargs: dict[str, Any]) -> bool:
        plain = attention_name(self.config) in (None, "eager") and not (self.training and self.attention_dropout)
        cached = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        added = isinstance(mask, torch.Tensor) and mask.is_floating_point() and mask.shape[1] == 1  # the same for all heads
        return plain and not cached and added and not outputs_are_captured()


class TrainedGroupedLinear(nn.Module):
    """y_g = x_g W_g^T for each group of columns, where W_g are consecutive rows of the weight; a mixin for Transformers'
    class."""

    weight: torch.Tensor
    n_groups: int

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and hasattr(module, "n_groups") and module.bias is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., G, K] -> [..., G, N / G]."""
        return grouped_columns(x, self.weight)
