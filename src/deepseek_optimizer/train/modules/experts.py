"""Experts of DeepSeek-V2, V3 and V3.2, trained in grouped form: rows sorted by expert, one product for all of them.

y_t = sum over the chosen experts e of down_e (weight_te * silu(gate_e x_t) * (up_e x_t)), which is what Transformers'
`DeepseekV3Experts` computes (DeepSeekMoE, arXiv 2401.06066, section 3), with the weight on the narrow side of `down`, so that
its gradient needs nothing as wide as the model. Sums run in one order, by expert, whatever order the router names them in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...integration.training.modules import is_expert_parallel, uses_silu
from ..fp8.backend import Fp8Products
from ..fp8.linear import fp8_grouped_linear
from ..kept import Kept
from ..ops.grouped import grouped_linear
from ..ops.swiglu import swiglu


class _Dispatch(torch.autograd.Function):
    """[T, H] -> [T K, H], the rows of each expert together. The gradient of a token is a sum over its K rows in their order,
    where that of indexing would add them up in any."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, place)
        return dispatch(x, order, place.shape[1])

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
        return dispatch(grads[0], order, place.shape[1]), None, None


def sum_rows(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[S, H], int64 [T, K] -> [T, H]: the sum over k of rows[place_tk], in the order of k, in fp32 (fp64 for fp64)."""
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows[place[:, 0]].to(exact)
    for column in place.t()[1:]:
        total += rows[column]
    return total.to(rows.dtype)


class _Gated(torch.autograd.Function):
    """[S, 2 I], [S] -> [S, I]: weight * silu(gate) * up, which keeps its operands alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights)
        return gated(gate_up, weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate_up, weights = ctx.saved_tensors
        with torch.enable_grad():
            both = gate_up.detach().requires_grad_()
            h = swiglu(*both.chunk(2, -1))
        (toward,) = torch.autograd.grad(h, both, grads[0] * weights.to(h.dtype)[:, None])
        exact = torch.float64 if h.dtype == torch.float64 else torch.float32
        return toward, (grads[0].to(exact) * h.detach()).sum(-1).to(weights.dtype)


def gated(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[S, 2 I], [S] -> [S, I]: weight * silu(gate) * up."""
    return swiglu(*gate_up.chunk(2, -1)) * weights.to(gate_up.dtype)[:, None]


def dispatch(x: torch.Tensor, order: torch.Tensor, chosen: int) -> torch.Tensor:
    """[T, H] -> [T K, H]: row s is that of the token that choice `order`[s] of T K is of."""
    return x[order // chosen]


def grouped_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    kept: Kept | None = None,
    fp8: Fp8Products | None = None,
) -> torch.Tensor:
    """
    Args:
        x: [T, H].
        gate_up, down: [E, 2 I, H] and [E, H, I], of x's dtype.
        index: int64 [T, K], the experts of each token, all different.
        weights: [T, K], what each of them counts; differentiable.
        kept: what of each chosen row may be made again in the backward is told to it: of rows, gates and ups stay.
        fp8: how the products run in FP8; None: in x's dtype.

    Returns: [T, H] of x's dtype.
    """
    kept = Kept(everything=True) if kept is None else kept
    product = grouped_linear if fp8 is None else partial(fp8_grouped_linear, how=fp8)
    index, by_expert = index.sort(-1)
    flat, chosen = index.flatten(), index.shape[1]
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device, dtype=torch.int64)
    place = place.view_as(index)
    counts = flat.bincount(minlength=len(gate_up))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    each = weights.gather(-1, by_expert).flatten()[order]
    rows = kept.again(_Dispatch.apply(x, order, place), partial(dispatch, x.detach(), order, chosen))
    both = product(rows, gate_up, offsets)
    h = kept.again(_Gated.apply(both, each), partial(gated, both.detach(), each.detach()))
    result: torch.Tensor = _Collect.apply(product(h, down, offsets), order, place)
    return result


class TrainedExperts(nn.Module):
    """The forward of experts that are trained; a mixin before the class of Transformers' own."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    kept: Kept

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is what this is the forward of: gates and ups merged, SiLU, no biases, and no experts elsewhere."""
        found = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
        return (
            found == {"gate_up_proj": 3, "down_proj": 3}
            and uses_silu(module)
            and not getattr(module, "is_transposed", False)
            and getattr(module, "is_concatenated", True)
            and not is_expert_parallel(module)
        )

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] -> [T, H] of hidden_states' dtype."""
        fp8: Fp8Products | None = getattr(self, "fp8", None) if self.training else None
        where = (top_k_index, top_k_weights, getattr(self, "kept", None), fp8)
        return grouped_experts(hidden_states, self.gate_up_proj, self.down_proj, *where)
