"""`PackedExperts`: replaces Transformers' modules of experts, such as `DeepseekV3Experts`, and owns the packed stacks.

The router remains Transformers' module: its weight is small, decides which experts are computed, and stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...backends.reference.ops import clamped_swiglu
from ...quant import PackedStack, PackedWeight, unpack
from ...quant.products import linear, linear_gradient
from ...quant.transposed_stack import StackLayout, biases_of, parameter_of
from .modules import Gradient, Packed, PackedProduct, Product, empty_tiles


@dataclass(frozen=True)
class ClampedSwiglu:
    """The activation of experts with limits, see op `experts_gate_up`."""

    alpha: float
    limit: float
    raised: bool = True


class PackedExperts(Packed):
    """y_t = sum over the chosen experts e of weight_te * down_e (act(gate_e x_t) * (up_e x_t)).

    Only chosen experts are computed, each once for all its tokens.
    PEFT adapts float experts only and refuses these, also with `all-linear`; put adapters on attention.

    With biases, gate_e x_t + b_e and so on.

    Args:
        num_experts, hidden_dim, intermediate_dim: E, H and I, named as in Transformers' modules.
        gate_up_format, down_format: names of the weight formats.
        act_fn: the activation: a module, which is applied to gate, or `ClampedSwiglu`.
        dtype, device: as in `PackedLinear`.
        transposed: how Transformers stores the stacks and biases as `quant/transposed_stack.py` describes.

    Attributes:
        gate_up_proj: uint8 [2 E, ...tiles of I x H], gate and up of each expert in turn, without gradient.
        down_proj: uint8 [E, ...tiles of H x I].
        gate_up_proj_bias, down_proj_bias: float [E, 2 I] and [E, H], as in Transformers' module; None: there are none.
        product, gradient: as in `PackedLinear`.
        on_host: whether the stacks stay in the host's memory if the model goes to a device, whose backend lets the CPU compute
            them. Biases go with the model.
        listener: called with each expert's index, its inputs x, float [tokens, H], and the inputs of its down projection,
            h = act(gate x) * (up x), float [tokens, I]; for calibration.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        gate_up_format: str,
        down_format: str,
        *,
        act_fn: nn.Module | ClampedSwiglu,
        dtype: torch.dtype,
        device: Any = None,
        layout: StackLayout = "rows",
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_dim, intermediate_dim
        self.gate_up_format, self.down_format, self.dtype = gate_up_format, down_format, dtype
        self.gate_up_proj = empty_tiles(intermediate_dim, hidden_dim, gate_up_format, device, (2 * num_experts,))
        self.down_proj = empty_tiles(hidden_dim, intermediate_dim, down_format, device, (num_experts,))
        self.register_parameter("gate_up_proj_bias", None)
        self.register_parameter("down_proj_bias", None)
        self.act_fn, self.layout, self.on_host = act_fn, layout, False
        self.product: Product = linear
        self.gradient: Gradient = linear_gradient
        self.listener: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
        self._is_hf_initialized = True  # weights are loaded, never initialized at random

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if not self.on_host:
            return super()._apply(fn, recurse)
        self._refuse_casts(fn)
        own = self._parameters
        self._parameters = {name: value for name, value in own.items() if name.endswith("_bias")}
        try:
            nn.Module._apply(self, fn, recurse)
        finally:
            self._parameters = {**own, **self._parameters}
        return self

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
        """Computes the weighted sum of the chosen experts.

        Args:
            hidden_states: [T, H].
            top_k_index: int [T, K], the chosen experts; `num_experts` stands for none (expert parallelism marks experts of
                another process so).
            top_k_weights: [T, K].

        Returns: [T, H] in the dtype of hidden_states.
        """
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():  # ascending: the order of summation in every backend
            if expert == self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            y = self._result(expert, hidden_states[token])
            out.index_add_(0, token, (y * top_k_weights[token, place, None]).float())
        return out.to(hidden_states.dtype)

    def _result(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's result for rows x [n, H], without its weight."""
        gate_up, down, how = self.gate_up, self.down, (self.product, self.gradient)
        gate = PackedProduct.apply(x, gate_up.matrix(2 * expert), *how)
        up = PackedProduct.apply(x, gate_up.matrix(2 * expert + 1), *how)
        h = self._gated(*self._with_biases(expert, gate, up))
        if self.listener is not None:
            self.listener(expert, x, h)
        y: torch.Tensor = PackedProduct.apply(h, down.matrix(expert), *how)
        return y if self.down_proj_bias is None else y + self.down_proj_bias[expert].to(y)

    def _with_biases(self, expert: int, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.gate_up_proj_bias is None:
            return gate, up
        bias = self.gate_up_proj_bias[expert, None].to(gate)
        of_gate, of_up = bias[0].chunk(2) if self.layout == "rows" else biases_of(bias, self.intermediate_dim)[0]
        return gate + of_gate, up + of_up

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if isinstance(self.act_fn, ClampedSwiglu):
            return clamped_swiglu(gate, up, self.act_fn.limit, self.act_fn.alpha, self.act_fn.raised)
        h: torch.Tensor = self.act_fn(gate) * up
        return h

    def dequantized(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up_proj and down_proj as in Transformers' module: [E, 2 I, H] and [E, H, I], or [E, H, 2 I] and [E, I, H]."""
        stacks = []
        for stack in (self.gate_up, self.down):
            matrices = torch.stack([unpack(stack.matrix(i), dtype) for i in range(stack.count)])
            matrices = matrices.unflatten(0, (self.num_experts, -1))
            stacks.append(matrices.flatten(1, 2) if self.layout == "rows" else parameter_of(matrices, self.layout))
        return self.intact((stacks[0], stacks[1]))

    def extra_repr(self) -> str:
        formats = ", ".join(dict.fromkeys((self.gate_up_format, self.down_format)))
        return f"{self.num_experts} x ({self.hidden_dim}, {self.intermediate_dim}), {formats}"


class PackedWeighedExperts(PackedExperts):
    """Replaces `Llama4TextExperts`, whose caller multiplies the inputs by the weights, which are 0 for experts not chosen."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # as in Transformers' module
        """The result of each expert for its own rows; that of rows of zeros is 0 and is not computed.

        Args:
            hidden_states: [E * T, H], the weighted inputs of each expert in turn.

        Returns: [E * T, H].
        """
        out = torch.zeros_like(hidden_states)
        for expert, rows in enumerate(torch.arange(len(out), device=out.device, dtype=torch.int64).chunk(self.num_experts)):
            chosen = rows[(hidden_states[rows] != 0).any(-1)]
            if len(chosen):
                out.index_add_(0, chosen, self._result(expert, hidden_states[chosen]).to(out.dtype))
        return out
