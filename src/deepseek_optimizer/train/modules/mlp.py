"""Gated feed-forward blocks (SwiGLU: Shazeer, arXiv 2002.05202), in training."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..kept import Kept
from .linear import is_plain
from .plain_ops import mlp, swiglu


class TrainedMlp(nn.Module):
    """y = down(silu(gate(x)) * up(x)); a mixin before Transformers' own class of that form.

    The three projections may be anything that is called (adapters, packed weights); where they are plain products, one op does
    it all and makes the product of the gates again in the backward, unless all is to be kept.
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
        gate_proj, up_proj, down_proj = self.gate_proj, self.up_proj, self.down_proj
        if not self.kept.everything and is_plain(gate_proj) and is_plain(up_proj) and is_plain(down_proj):
            return mlp(x, gate_proj.weight, up_proj.weight, down_proj.weight)
        gate, up = gate_proj(x), up_proj(x)
        inner = self.kept.again(swiglu(gate, up), partial(swiglu, gate.detach(), up.detach()))
        result: torch.Tensor = down_proj(inner)
        return result
