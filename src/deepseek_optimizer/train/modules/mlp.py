"""Gated feed-forward blocks (SwiGLU: Shazeer, arXiv 2002.05202), for training."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ...integration.training.modules import silu_limit, uses_silu
from ..ops.mlp import mlp
from ..ops.swiglu import limited, swiglu
from ..saved_activations import SavedActivations
from .linear import is_plain


class TrainedMlp(nn.Module):
    """y = down(silu(gate(x)) * up(x)), where gate and up may be limited; a mixin for Transformers' class of that form.

    The three projections may be any modules, such as adapters or packed weights. If they are plain products without limits, the
    block is a single op.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    saved: SavedActivations

    @staticmethod
    def fits(module: nn.Module) -> bool:
        children = {name for name, _ in module.named_children()} - {"act_fn"}
        return (
            uses_silu(module)
            and children == {"gate_proj", "up_proj", "down_proj"}
            and not list(module.parameters(recurse=False))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        limit = silu_limit(self)
        if limit is None and all(is_plain(p) for p in projections):
            gate_w, up_w, down_w = (p.weight for p in projections)
            return mlp(x, gate_w, up_w, down_w, save_all=self.saved.save_all)  # type: ignore[arg-type]
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = self.saved.recomputable(_gated(gate, up, limit), partial(_gated, gate.detach(), up.detach(), limit))
        result: torch.Tensor = self.down_proj(inner)
        return result


def _gated(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    return swiglu(*limited(gate, up, limit))
