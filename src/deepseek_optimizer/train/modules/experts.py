"""Experts of DeepSeek-V2, V3 and V3.2, trained in grouped form: rows sorted by expert, one product for all of them.

y_t = sum over the chosen experts e of down_e (weight_te * silu(gate_e x_t) * (up_e x_t)), which is what Transformers'
`DeepseekV3Experts` computes (DeepSeekMoE, arXiv 2401.06066, section 3), with the weight on the narrow side of `down`, so that
its gradient needs nothing as wide as the model. Sums run in one order, by expert, whatever order the router names them in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .plain_ops import grouped_linear, swiglu


class _Dispatch(torch.autograd.Function):
    """[T, H] -> [T K, H], the rows of each expert together. The gradient of a token is a sum over its K rows in their order,
    where that of indexing would add them up in any."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, place)
        return x[order // place.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return sum_rows(grads[0], ctx.saved_tensors[1]), None, None


class _Collect(torch.autograd.Function):
    """[T K, H] -> [T, H], the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, place)
        return sum_rows(y, place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        order, place = ctx.saved_tensors
        return grads[0][order // place.shape[1]], None, None


def sum_rows(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[S, H], int64 [T, K] -> [T, H]: the sum over k of rows[place_tk], in the order of k, in fp32 (fp64 for fp64)."""
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows[place[:, 0]].to(exact)
    for column in place.t()[1:]:
        total += rows[column]
    return total.to(rows.dtype)


def grouped_experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """
    Args:
        x: [T, H].
        gate_up, down: [E, 2 I, H] and [E, H, I], of x's dtype.
        index: int64 [T, K], the experts of each token, all different.
        weights: [T, K], what each of them counts; differentiable.

    Returns: [T, H] of x's dtype.
    """
    index, by_expert = index.sort(-1)
    weights = weights.gather(-1, by_expert)
    order = index.flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place = place.view_as(index)
    counts = index.flatten().bincount(minlength=len(gate_up))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    rows = _Dispatch.apply(x, order, place)
    gate, up = grouped_linear(rows, gate_up, offsets).chunk(2, -1)
    h = swiglu(gate, up) * weights.flatten()[order].to(x.dtype)[:, None]
    result: torch.Tensor = _Collect.apply(grouped_linear(h, down, offsets), order, place)
    return result


class TrainedExperts(nn.Module):
    """The forward of experts that are trained; a mixin before the class of Transformers' own."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is what this is the forward of: gates and ups merged, SiLU, no biases, and no experts elsewhere."""
        found = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
        return (
            found == {"gate_up_proj": 3, "down_proj": 3}
            and isinstance(getattr(module, "act_fn", None), (nn.SiLU, type(ACT2FN["silu"])))
            and not getattr(module, "is_transposed", False)
            and getattr(module, "is_concatenated", True)
            and not getattr(module, "_is_expert_parallel", False)
        )

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] -> [T, H] of hidden_states' dtype."""
        return grouped_experts(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights)
