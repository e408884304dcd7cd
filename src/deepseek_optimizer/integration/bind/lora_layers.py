"""PEFT's LoRA layers around modules of a model: what they add, so that a plan can add it too."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...graph.ir import AdapterSite


@dataclass(frozen=True)
class LowRank:
    """scale * B A, which an adapter adds to the weight of a linear layer: A [r, K], B [N, r], parameters of the adapter."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    @property
    def state(self) -> tuple[Any, ...]:
        """Differs after the parameters were replaced or modified in place."""
        return self.down, self.down._version, self.up, self.up._version, self.scale


def is_lora_layer(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer around a linear layer."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and type(module) is layers.Linear


def added_by(layer: Any) -> list[LowRank] | str:
    """What the active adapters of a LoRA layer add, or why a plan cannot add it.

    Source: `forward` of PEFT's `peft.tuners.lora.layer.Linear`.
    """
    if layer.disable_adapters and layer.merged:
        return "a merged adapter is disabled"  # PEFT's forward takes it out of the weights
    if layer.disable_adapters or layer.merged:
        return []
    parts = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(name) or layer.fan_in_fan_out:
            return f"adapter {name!r} is not plain LoRA"
        if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
            return f"adapter {name!r} is in training mode and has dropout"
        parts.append(LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])))
    return parts


@torch.no_grad()
def sum_of(parts: list[LowRank]) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair A, B for several, float32; B contains the scales."""
    down = torch.cat([part.down.float() for part in parts])
    return down, torch.cat([part.up.float() * part.scale for part in parts], 1)


def pair_of_site(site: AdapterSite, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A site's own matrices, of its `pair_shapes`, from those of its module."""
    if site.rows is not None:
        return down, up[site.rows[0] : site.rows[1]]
    if site.latent is None:
        return down, up
    keys, values = up.unflatten(0, (site.heads, -1)).split((site.latent.nope, site.latent.v_dim), 1)
    # The keys of a head are multiplied from the other side: (B_h A)^T = A^T B_h^T.
    return (keys.transpose(1, 2), down.T) if site.latent.keys else (down, values)


def without_adapter(module: nn.Module) -> nn.Module:
    """The layer that PEFT has put a LoRA layer around, or the module itself."""
    return module._modules["base_layer"] or module if is_lora_layer(module) else module
