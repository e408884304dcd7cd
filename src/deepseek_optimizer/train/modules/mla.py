"""Multi-head latent attention (MLA) of DeepSeek-V2, V3 and derived models in training, in expanded form: the keys and values
of every head are computed from the latents (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The projections and norms are called as modules, so they may be adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...integration.compat import CACHE_NAMES
from ...integration.training.modules import attention_function, attention_name
from ..ops.rope import rope

_CHILDREN = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
_WIDTHS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")


class TrainedLatentAttention(nn.Module):
    """Forward of latent attention; a mixin for Transformers' class, which still handles calls with a cache and eager
    attention."""

    q_proj: nn.Module | None
    q_a_proj: nn.Module
    q_a_layernorm: nn.Module
    q_b_proj: nn.Module
    kv_a_proj_with_mqa: nn.Module
    kv_a_layernorm: nn.Module
    kv_b_proj: nn.Module
    o_proj: nn.Module
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    scaling: float
    attention_dropout: float
    config: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is latent attention without an indexer, which selects keys in DeepSeek-V3.2."""
        children = dict(module.named_children())
        if "indexer" in children or not all(child in children for child in _CHILDREN):
            return False
        queries = "q_proj" in children or {"q_a_proj", "q_a_layernorm", "q_b_proj"} <= children.keys()
        return queries and all(hasattr(module, width) for width in _WIDTHS)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """hidden_states [B, S, H] -> ([B, S, H], None). position_embeddings: (cos, sin), or V2's complex numbers."""
        implementation = attention_name(self.config)
        if implementation == "eager" or any(kwargs.get(name) is not None for name in CACHE_NAMES):
            where = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return super().forward(hidden_states=hidden_states, **where, **kwargs)
        cos, sin, interleaved = self._rotation(position_embeddings)
        query, key, value = self._expanded(hidden_states, cos, sin, interleaved)
        dropout = self.attention_dropout if self.training else 0.0
        attend = attention_function(implementation)
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights

    def _rotation(self, position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
        if isinstance(position_embeddings, torch.Tensor):  # V2: cos + i sin, [B, S, rope / 2], interleaved
            cos, sin = position_embeddings.real, position_embeddings.imag
            return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), True
        cos, sin = position_embeddings
        return cos, sin, bool(self.config.rope_interleave)

    def _expanded(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query and key [B, heads, S, nope + rope] and value [B, heads, S, v]. The rotated columns have the order in which
        `rope` returns them, which is the same in queries and keys and does not affect scores."""
        batch, length = x.shape[:2]
        nope, rotary = self.qk_nope_head_dim, self.qk_rope_head_dim
        q_proj = getattr(self, "q_proj", None)
        q = q_proj(x) if q_proj is not None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(batch, length, -1, nope + rotary).transpose(1, 2).split((nope, rotary), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.kv_lora_rank, rotary), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, -1, nope + self.v_head_dim).transpose(1, 2)
        k_nope, value = kv.split((nope, self.v_head_dim), -1)
        k_rope = rope(k_rope[:, None], cos, sin, interleaved=interleaved).expand(-1, kv.shape[1], -1, -1)
        query = torch.cat((q_nope, rope(q_rope, cos, sin, interleaved=interleaved)), -1)
        return query, torch.cat((k_nope, k_rope), -1), value
