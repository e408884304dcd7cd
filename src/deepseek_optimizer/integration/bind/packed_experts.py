"""`PackedExperts`: stands where Transformers' `DeepseekV2Experts`, `V3Experts` and `V32Experts` stood, and owns packed stacks.

The router beside it stays Transformers' own: its weight is small, decides what is computed, and is kept in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...quant import PackedStack, PackedWeight, unpack
from ...quant.products import linear, linear_gradient
from .modules import Gradient, Packed, PackedProduct, Product, empty_tiles


class PackedExperts(Packed):
    """y_t = sum over the chosen experts e of weight_te * down_e (act(gate_e x_t) * (up_e x_t)).

    Only the experts that some token chose are multiplied with, each once for all its tokens.
    Adapters go beside it, on attention: PEFT wants experts of floats, and refuses these (`all-linear` would reach them too).

    Args:
        num_experts, hidden_dim, intermediate_dim: E, H and I, named as in Transformers' modules.
        gate_up_format, down_format: names of the weight formats.
        act_fn: the activation module.
        dtype, device: as `PackedLinear` has them.

    Attributes:
        gate_up_proj: uint8 [2 E, ...tiles of I x H], gate and up of each expert in turn, without gradient.
        down_proj: uint8 [E, ...tiles of H x I].
        product, gradient: as `PackedLinear` has them.
        listener: called with each h = act(gate x) * (up x), float [tokens, I], that down is multiplied with; for calibration.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        gate_up_format: str,
        down_format: str,
        *,
        act_fn: nn.Module,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_dim, intermediate_dim
        self.gate_up_format, self.down_format, self.dtype = gate_up_format, down_format, dtype
        self.gate_up_proj = empty_tiles(intermediate_dim, hidden_dim, gate_up_format, device, (2 * num_experts,))
        self.down_proj = empty_tiles(hidden_dim, intermediate_dim, down_format, device, (num_experts,))
        self.act_fn = act_fn
        self.product: Product = linear
        self.gradient: Gradient = linear_gradient
        self.listener: Callable[[torch.Tensor], None] | None = None
        self._is_hf_initialized = True  # weights are loaded, never drawn

    @property
    def gate_up(self) -> PackedStack:
        return PackedStack(
            self.gate_up_format, 2 * self.num_experts, self.intermediate_dim, self.hidden_dim, self.gate_up_proj.data
        )

    @property
    def down(self) -> PackedStack:
        return PackedStack(self.down_format, self.num_experts, self.hidden_dim, self.intermediate_dim, self.down_proj.data)

    def held(self) -> dict[str, PackedWeight]:
        return {"gate_up_proj": self.gate_up, "down_proj": self.down}

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int [T, K], top_k_weights [T, K] -> [T, H] of hidden_states' dtype.

        An index of `num_experts` chooses nobody (expert parallelism marks so what another process has).
        """
        gate_up, down, how = self.gate_up, self.down, (self.product, self.gradient)
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():  # ascending, as a token's sum runs in every backend
            if expert == self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            x = hidden_states[token]
            gate = PackedProduct.apply(x, gate_up.matrix(2 * expert), *how)
            up = PackedProduct.apply(x, gate_up.matrix(2 * expert + 1), *how)
            h = self.act_fn(gate) * up
            if self.listener is not None:
                self.listener(h)
            y = PackedProduct.apply(h, down.matrix(expert), *how) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.float())
        return out.to(hidden_states.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up_proj [E, 2 I, H] and down_proj [E, H, I] as Transformers' module has them."""
        gate_up, down = self.gate_up, self.down
        rows = [unpack(gate_up.matrix(i), dtype) for i in range(gate_up.count)]
        return self.intact(
            (
                torch.stack(rows).view(self.num_experts, -1, self.hidden_dim),
                torch.stack([unpack(down.matrix(i), dtype) for i in range(down.count)]),
            )
        )

    def extra_repr(self) -> str:
        formats = ", ".join(dict.fromkeys((self.gate_up_format, self.down_format)))
        return f"{self.num_experts} x ({self.hidden_dim}, {self.intermediate_dim}), {formats}"
