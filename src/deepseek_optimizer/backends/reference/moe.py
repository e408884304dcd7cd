"""Mixture of experts: the router and the experts' products. Source: DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from . import ops

Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    factors: torch.Tensor | None = None,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    scoring: str,
    group_score: str,
    normalise: bool,
    scale: float,
) -> torch.Tensor:
    """float32 [T, 2 * top_k]: the indices of the chosen experts, ascending, then their weights.

    A group is rated by its best score ("max") or the sum of its two best ("top2"); experts outside the best groups cannot be
    chosen. `bias` affects only the choice.

    Args:
        logits: float32 [T, experts].
        bias: float32 [experts], or None.
        factors: float32 [experts], of the weights of each expert, or None.
        top_k: experts per token.
        groups, top_groups: number of groups, and of groups that experts may be chosen from.
        scoring: "softmax" or "sigmoid".
        group_score: "max" or "top2".
        normalise: whether weights are divided by their sum.
        scale: factor of the weights.
    """
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if groups > 1:
        by_group = choice.unflatten(-1, (groups, -1))
        best_of = by_group.amax(-1) if group_score == "max" else by_group.topk(2, -1).values.sum(-1)
        allowed = torch.zeros_like(best_of, dtype=torch.bool).scatter_(1, ops.best(best_of, top_groups), True)
        choice = by_group.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
    chosen = ops.best(choice, top_k).sort(-1).values
    weights = scores.gather(1, chosen)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale
    return torch.cat((chosen.float(), weights if factors is None else weights * factors[chosen]), -1)


def gate_up(
    x: torch.Tensor, routes: torch.Tensor, weight: torch.Tensor, grouped: bool, gated: Gated = ops.swiglu
) -> torch.Tensor:
    """[T * top_k, I]: gated(gate x, up x) for each token's chosen experts.

    Args:
        x: [T, H].
        weight: [experts, 2 I, H], gate before up.
        gated: `ops.swiglu` or `ops.geglu`.
    """
    top_k = routes.shape[-1] // 2
    out = x.new_empty(len(x) * top_k, weight.shape[1] // 2)
    for expert, rows in _visits(routes[:, :top_k], grouped):
        out[rows] = gated(*F.linear(x[rows // top_k], weight[expert]).chunk(2, -1))
    return out


def down(hidden: torch.Tensor, routes: torch.Tensor, weight: torch.Tensor, grouped: bool) -> torch.Tensor:
    """float32 [T, H]: the weighted sum of the chosen experts' results, in ascending order of experts.

    Args:
        hidden: [T * top_k, I].
        weight: [experts, H, I].
    """
    chosen, shares = routes.chunk(2, -1)
    out = hidden.new_empty(len(hidden), weight.shape[1])
    for expert, rows in _visits(chosen, grouped):
        out[rows] = F.linear(hidden[rows], weight[expert])
    parts = shares[..., None] * out.float().unflatten(0, chosen.shape)
    total = torch.zeros_like(parts[:, 0])
    for part in parts.unbind(1):
        total += part
    return total


def _visits(chosen: torch.Tensor, grouped: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """Pairs of an expert and its rows: once per expert if grouped, else once per row."""
    flat = chosen.flatten().long()
    if grouped:
        for expert in flat.unique().tolist():
            yield expert, (flat == expert).nonzero()[:, 0]
    else:
        for row, expert in enumerate(flat.tolist()):
            yield expert, torch.tensor([row], device=flat.device, dtype=torch.int64)
