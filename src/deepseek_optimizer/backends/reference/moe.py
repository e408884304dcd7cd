"""Mixture of experts: the router and the experts' products. Source: DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
import torch.nn.functional as F

from ...graph.ir import Graph
from ...quant.transposed_stack import biases_of, matrices_of
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
    normalize: bool,
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
        scoring: "softmax", "sigmoid" or "sqrtsoftplus".
        group_score: "max" or "top2".
        normalize: whether weights are divided by their sum.
        scale: factor of the weights.
    """
    scores = _SCORES[scoring](logits)
    choice = scores if bias is None else scores + bias
    if groups > 1:
        by_group = choice.unflatten(-1, (groups, -1))
        best_of = by_group.amax(-1) if group_score == "max" else by_group.topk(2, -1).values.sum(-1)
        allowed = torch.zeros_like(best_of, dtype=torch.bool).scatter_(1, ops.best(best_of, top_groups), True)
        choice = by_group.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
    return _weighed(scores, ops.best(choice, top_k), normalize, scale, factors)


def route_to(logits: torch.Tensor, chosen: torch.Tensor, *, scoring: str, normalize: bool, scale: float) -> torch.Tensor:
    """As `route`, for given experts.

    Args:
        chosen: int64 [T, top_k].
    """
    return _weighed(_SCORES[scoring](logits), chosen, normalize, scale)


def _weighed(
    scores: torch.Tensor, chosen: torch.Tensor, normalize: bool, scale: float, factors: torch.Tensor | None = None
) -> torch.Tensor:
    chosen = chosen.sort(-1).values
    weights = scores.gather(1, chosen)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale
    return torch.cat((chosen.float(), weights if factors is None else weights * factors[chosen]), -1)


_SCORES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def gate_up(
    x: torch.Tensor,
    routes: torch.Tensor,
    weight: torch.Tensor,
    grouped: bool,
    gated: Gated = ops.swiglu,
    bias: torch.Tensor | None = None,
    weigh_input: bool = False,
    first: int = 0,
) -> torch.Tensor:
    """[T * top_k, I]: gated(gate x, up x) for each token's chosen experts; zeros for those that `weight` does not have.

    Args:
        x: [T, H].
        weight: [experts, 2 I, H], gate before up.
        gated: computes h from gate and up.
        bias: [experts, 2 I].
        weigh_input: whether x is multiplied by the expert's weight.
        first: number of the first expert in `weight`.
    """
    top_k = routes.shape[-1] // 2
    shares = routes[:, top_k:].flatten()[:, None].to(x.dtype)
    out = x.new_zeros(len(x) * top_k, weight.shape[1] // 2)
    for expert, rows in _visits(routes[:, :top_k] - first, len(weight), grouped):
        read = x[rows // top_k] * shares[rows] if weigh_input else x[rows // top_k]
        both = F.linear(read, weight[expert], None if bias is None else bias[expert])
        out[rows] = gated(*both.chunk(2, -1))
    return out


def down(
    hidden: torch.Tensor,
    routes: torch.Tensor,
    weight: torch.Tensor,
    grouped: bool,
    bias: torch.Tensor | None = None,
    weigh_input: bool = False,
    first: int = 0,
) -> torch.Tensor:
    """float32 [T, H]: the weighted sum of the results of the chosen experts that `weight` has, in ascending order of experts;
    with `weigh_input`, the sum without weights.

    Args:
        hidden: [T * top_k, I].
        weight: [experts, H, I].
        bias: [experts, H].
        first: number of the first expert in `weight`.
    """
    chosen, shares = routes.chunk(2, -1)
    out = hidden.new_zeros(len(hidden), weight.shape[1])
    for expert, rows in _visits(chosen - first, len(weight), grouped):
        out[rows] = F.linear(hidden[rows], weight[expert], None if bias is None else bias[expert])
    parts = out.float().unflatten(0, chosen.shape)
    if not weigh_input:
        parts = shares[..., None] * parts
    total = torch.zeros_like(parts[:, 0])
    for part in parts.unbind(1):
        total += part
    return total


def ordered_stacks(graph: Graph, weights: Mapping[str, torch.Tensor], packed: Collection[str]) -> dict[str, torch.Tensor]:
    """Weights and biases of nodes whose `layout` is not "rows" in the order of others, by name: [E, M * rows, cols] and
    [E, M * rows].

    Args:
        graph: the graph.
        weights: float weights by name; stacks as Transformers' parameters, or [E * M, rows, cols].
        packed: names of the stacks in the latter form.
    """
    ordered = {}
    for node in graph.nodes:
        if node.attrs.get("layout", "rows") != "rows":
            a, (name,), rows = node.attrs, node.weights, node.outputs[0].width
            weight, experts = weights[name], a["experts"]
            matrices = weight.unflatten(0, (experts, -1)) if name in packed else matrices_of(weight, rows, a["layout"])
            ordered[name] = matrices.flatten(1, 2).contiguous()
            for bias in filter(None, a.get("biases", ())):
                ordered[bias] = biases_of(weights[bias], rows).flatten(1)
    return ordered


def _visits(chosen: torch.Tensor, experts: int, grouped: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """Pairs of an expert, from 0 to `experts` - 1, and its rows: once per expert if grouped, else once per row."""
    flat = chosen.flatten().long()
    if grouped:
        for expert in flat.unique().tolist():
            if 0 <= expert < experts:
                yield expert, (flat == expert).nonzero()[:, 0]
    else:
        for row, expert in enumerate(flat.tolist()):
            if 0 <= expert < experts:
                yield expert, torch.tensor([row], device=flat.device, dtype=torch.int64)
