"""Gated feed-forward blocks (SwiGLU: Shazeer, arXiv 2002.05202), in training."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..kept import Kept
from ..ops.swiglu import swiglu


class TrainedMlp(nn.Module):
    """y = down(silu(gate(x)) * up(x)); a mixin before Transformers' own class of that form.

    The three projections may be anything that is called: adapters, packed weights.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    kept: Kept

    @staticmethod
    def fits(module: nn.Module) -> bool:
        children = {name for name, _ in module.named_children()} - {"act_fn"}
        silu = isinstance(getattr(module, "act_fn", None), (nn.SiLU, type(ACT2FN["silu"])))
        return silu and children == {"gate_proj", "up_proj", "down_proj"} and not list(module.parameters(recurse=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = self.kept.again(swiglu(gate, up), partial(swiglu, gate.detach(), up.detach()))
        result: torch.Tensor = self.down_proj(inner)
        return result
