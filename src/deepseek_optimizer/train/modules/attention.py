"""Grouped-query attention as in Llama, Mistral, Qwen2 and Qwen3, for training.

The projections are called as modules, so they may be adapters or have packed weights. The attention function is the one that
the config names (`dso_train` once a model is prepared).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...integration.compat import CACHE_NAMES
from ...integration.training.modules import attention_function, attention_name
from ...models.families import traits
from ..ops.linear import linears
from ..ops.rope import rope
from .linear import is_plain

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}


class TrainedAttention(nn.Module):
    """Forward of grouped-query attention; a mixin for Transformers' class, which still handles calls with a cache and eager
    attention."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    attention_dropout: float
    sliding_window: Any
    config: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        children = {name for name, _ in module.named_children()}
        supported = traits(getattr(module, "config", None)).rotates_halves
        return supported and children in (_PROJECTIONS, _PROJECTIONS | _NORMS) and hasattr(module, "scaling")

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, H] -> ([B, S, H], attention weights or None)."""
        implementation = attention_name(self.config)
        if implementation == "eager" or any(kwargs.get(name) is not None for name in CACHE_NAMES):
            where = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            result: Any = super().forward(hidden_states=hidden_states, **where, **kwargs)
            return result
        cos, sin = position_embeddings
        q, k, v = self._projected(hidden_states)
        query, key, value = rope(self._heads(q, "q_norm"), cos, sin), rope(self._heads(k, "k_norm"), cos, sin), self._heads(v)
        attend = attention_function(implementation)
        dropout = self.attention_dropout if self.training else 0.0
        window = {"sliding_window": self._window} if self._window is not None else {}
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **window, **kwargs
        )
        return self.o_proj(out.flatten(2)), weights

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, S, H] -> query, key and value, [B, S, heads D] each."""
        projections: list[Any] = [self.q_proj, self.k_proj, self.v_proj]
        if all(map(is_plain, projections)):
            return linears(x, [projection.weight for projection in projections])
        return tuple(projection(x) for projection in projections)

    def _heads(self, x: torch.Tensor, norm: str = "") -> torch.Tensor:
        """[B, S, heads D] -> [B, heads, S, D], a view that is not contiguous."""
        heads = x.view(*x.shape[:-1], -1, self.head_dim)
        if norm and hasattr(self, norm):
            heads = getattr(self, norm)(heads)
        return heads.transpose(1, 2)

    @property
    def _window(self) -> int | None:
        """Number of tokens that a token attends to; None: all earlier ones."""
        if hasattr(self, "sliding_window"):
            own: int | None = self.sliding_window
            return own
        return getattr(self.config, "sliding_window", None) if traits(self.config).window_from_config else None
