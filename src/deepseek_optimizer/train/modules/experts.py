"""Experts of DeepSeek-V2 to V4 in training: rows are sorted by expert, and one grouped product covers all experts.

y_t = sum over the chosen experts e of down_e (weight_te * silu(gate_e x_t) * (up_e x_t)). This equals Transformers'
`DeepseekV3Experts` (DeepSeekMoE, arXiv 2401.06066, section 3), but the weight is applied to the narrow input of `down`, so that
its gradient needs no tensor of the hidden size. In DeepSeek-V4, gate and up are limited before (`silu_limit`). Sums always run
in the order of experts, whatever order the router returns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...integration.training.modules import is_expert_parallel, silu_limit, uses_silu
from ..fp8.backend import Fp8Products
from ..fp8.linear import fp8_grouped_linear
from ..ops.grouped import grouped_linear
from ..ops.swiglu import limited, swiglu
from ..saved_activations import SavedActivations


class _Dispatch(torch.autograd.Function):
    """[T, H] -> [T K, H], rows sorted by expert. The gradient of a token sums its K rows in a fixed order; that of torch's
    indexing would not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, place)
        return dispatch(x, order, place.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return sum_rows(grads[0], ctx.saved_tensors[1]), None, None


class _Collect(torch.autograd.Function):
    """[T K, H] -> [T, H], summing the rows of each token."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, place)
        return sum_rows(y, place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        order, place = ctx.saved_tensors
        return dispatch(grads[0], order, place.shape[1]), None, None


def sum_rows(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[S, H], int64 [T, K] -> [T, H]: the sum over k of rows[place_tk], in the order of k, in fp32 (fp64 for fp64)."""
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows[place[:, 0]].to(exact)
    for column in place.t()[1:]:
        total += rows[column]
    return total.to(rows.dtype)


class _Gated(torch.autograd.Function):
    """[S, 2 I], [S] -> [S, I]: weight * silu(gate) * up. Saves only its operands."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weights: torch.Tensor, limit: float | None) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights)
        ctx.limit = limit
        return gated(gate_up, weights, limit)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate_up, weights = ctx.saved_tensors
        with torch.enable_grad():
            both = gate_up.detach().requires_grad_()
            gate, up = both.chunk(2, -1)
            h = swiglu(*limited(gate, up, ctx.limit))
        (gate_up_grad,) = torch.autograd.grad(h, both, grads[0] * weights.to(h.dtype)[:, None])
        exact = torch.float64 if h.dtype == torch.float64 else torch.float32
        return gate_up_grad, (grads[0].to(exact) * h.detach()).sum(-1).to(weights.dtype), None


def gated(gate_up: torch.Tensor, weights: torch.Tensor, limit: float | None) -> torch.Tensor:
    """[S, 2 I], [S] -> [S, I]: weight * silu(gate) * up, after `limited`."""
    gate, up = gate_up.chunk(2, -1)
    return swiglu(*limited(gate, up, limit)) * weights.to(gate_up.dtype)[:, None]


def dispatch(x: torch.Tensor, order: torch.Tensor, chosen: int) -> torch.Tensor:
    """[T, H] -> [T K, H]: row s is that of token order[s] // K, where K is `chosen`."""
    return x[order // chosen]


def grouped_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    saved: SavedActivations | None = None,
    fp8: Fp8Products | None = None,
    limit: float | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, by grouped products.

    Args:
        x: [T, H].
        gate_up, down: [E, 2 I, H] and [E, H, I], of x's dtype.
        index: int64 [T, K], the experts of each token, all different.
        weights: [T, K], the weight of each chosen expert; differentiable.
        saved: marks the dispatched rows and the gated products as recomputable, so that only the outputs of gate and up are
            saved; None: save everything.
        fp8: the FP8 products; None: products in x's dtype.
        limit: as in `silu_limit`.

    Returns: [T, H] of x's dtype.
    """
    saved = SavedActivations(save_all=True) if saved is None else saved
    product = grouped_linear if fp8 is None else partial(fp8_grouped_linear, products=fp8)
    index, by_expert = index.sort(-1)
    flat, chosen = index.flatten(), index.shape[1]
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device, dtype=torch.int64)
    place = place.view_as(index)
    counts = flat.bincount(minlength=len(gate_up))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    row_weights = weights.gather(-1, by_expert).flatten()[order]
    rows = saved.recomputable(_Dispatch.apply(x, order, place), partial(dispatch, x.detach(), order, chosen))
    both = product(rows, gate_up, offsets)
    h = saved.recomputable(_Gated.apply(both, row_weights, limit), partial(gated, both.detach(), row_weights.detach(), limit))
    result: torch.Tensor = _Collect.apply(product(h, down, offsets), order, place)
    return result


class TrainedExperts(nn.Module):
    """Forward of stacked experts; a mixin for Transformers' class."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    saved: SavedActivations

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module has merged gate and up matrices, SiLU, no biases, and all experts in this process."""
        shapes = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
        return (
            {name: len(shape) for name, shape in shapes.items()} == {"gate_up_proj": 3, "down_proj": 3}
            and shapes["gate_up_proj"][2] == shapes["down_proj"][1]  # not transposed, as in Llama 4
            and uses_silu(module)
            and not getattr(module, "is_transposed", False)
            and getattr(module, "is_concatenated", True)
            and not is_expert_parallel(module)
        )

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] -> [T, H] of hidden_states' dtype."""
        fp8: Fp8Products | None = getattr(self, "fp8", None) if self.training else None
        where = (top_k_index, top_k_weights, getattr(self, "saved", None), fp8, silu_limit(self))
        return grouped_experts(hidden_states, self.gate_up_proj, self.down_proj, *where)
