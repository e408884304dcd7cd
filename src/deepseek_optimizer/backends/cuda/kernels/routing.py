"""Chooses the experts of each token from the router's scores.

One program chooses for one token: a layer has at most a few hundred experts, which fit into the registers of a warp. A choice
is the largest element, taken again and again; of equal ones it is that with the smallest number, as in the reference. Where
scores are NaN, the chosen numbers are still those of experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + e^x), also where 1 + e^x is 1 in float32: log(u) e / (u - 1) with e = e^-|x| and u = 1 + e (Goldberg 1991)."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def route_rows(
    scores, bias, factors, ids, table, routes, experts, scale, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, SCORING: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr,
    FACTORED: tl.constexpr, BY_TABLE: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """routes = the chosen experts, ascending, then their weights; see ops `router` and `hash_router`. Grid (tokens).

    Args:
        scores: float32 [T, experts], products of the router.
        bias, factors: float32 [experts], read if BIASED and FACTORED.
        ids, table: int32 [T] and [V, TOP_K], the experts of each token's id, read if BY_TABLE: then no expert is chosen.
        routes: float32 [T, 2 * TOP_K].
        SCORING: "softmax", "sigmoid" or "sqrtsoftplus".
        TOP2: a group is rated by the sum of its two best; otherwise by its best.
        GROUP_BLOCK, BLOCK: powers of two >= GROUPS, and >= the experts of a group.
    """
    token = tl.program_id(0).to(tl.int64)
    each = experts // GROUPS
    group, i = tl.arange(0, GROUP_BLOCK), tl.arange(0, BLOCK)
    real = (group < GROUPS)[:, None] & (i < each)[None, :]
    expert = tl.where(real, group[:, None] * each + i[None, :], experts)
    score = tl.load(scores + token * experts + expert, mask=real, other=float("-inf"))
    if SCORING == "softmax":
        score = tl.exp(score - tl.max(score))
        score = score / tl.sum(score)
    elif SCORING == "sqrtsoftplus":
        score = tl.sqrt_rn(softplus(score))
    else:
        tl.static_assert(SCORING == "sigmoid")
        score = tl.sigmoid(score)
    left = score
    if BIASED:
        left += tl.load(bias + expert, mask=real, other=0.0)
    left = tl.where(real, left, float("-inf"))
    if GROUPS > 1:
        rating = tl.max(left, 1)
        if TOP2:
            first = tl.min(tl.where(left == rating[:, None], i[None, :], BLOCK), 1)
            rating += tl.max(tl.where(i[None, :] == first[:, None], float("-inf"), left), 1)
        allowed = tl.zeros([GROUP_BLOCK], tl.int32)
        for _ in range(TOP_GROUPS):
            best = tl.min(tl.where(rating == tl.max(rating), group, GROUPS - 1))
            allowed = tl.where(group == best, 1, allowed)
            rating = tl.where(group == best, float("-inf"), rating)
        left = tl.where(allowed[:, None] == 1, left, float("-inf"))
    chosen = tl.zeros([GROUP_BLOCK, BLOCK], tl.int32)
    if BY_TABLE:
        own = table + tl.load(ids + token).to(tl.int64) * TOP_K
        for j in range(TOP_K):
            chosen = tl.where(expert == tl.load(own + j), 1, chosen)
    else:
        for _ in range(TOP_K):
            best = tl.min(tl.where(left == tl.max(left), expert, experts - 1))
            chosen = tl.where(expert == best, 1, chosen)
            left = tl.where(expert == best, float("-inf"), left)
    total = tl.sum(tl.where(chosen == 1, score, 0.0))
    place = routes + token * (2 * TOP_K)
    for j in range(TOP_K):
        best = tl.min(tl.where(chosen == 1, expert, experts - 1))
        weight = tl.sum(tl.where(expert == best, score, 0.0))
        if NORMALIZE:
            weight = weight / (total + 1e-20)
        weight = weight * scale
        if FACTORED:
            weight *= tl.load(factors + best)
        tl.store(place + j, best.to(tl.float32))
        tl.store(place + TOP_K + j, weight)
        chosen = tl.where(expert == best, 0, chosen)


def route(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    factors: torch.Tensor | None,
    routes: torch.Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    scoring: str,
    group_score: str,
    normalize: bool,
    scale: float,
    by_table: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See `route_rows`; the options are those of `reference.moe.route`, and `by_table` ids and table."""
    tokens, experts = scores.shape
    group_block, block = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    ids, table = (scores, scores) if by_table is None else by_table
    route_rows[(tokens,)](
        scores, scores if bias is None else bias, scores if factors is None else factors, ids, table, routes, experts, scale,
        GROUPS=groups, TOP_GROUPS=top_groups, TOP_K=top_k, SCORING=scoring, TOP2=group_score == "top2", NORMALIZE=normalize,
        BIASED=bias is not None, FACTORED=factors is not None, BY_TABLE=by_table is not None, GROUP_BLOCK=group_block,
        BLOCK=block, num_warps=1 if group_block * block <= 512 else 4,
    )  # fmt: skip
