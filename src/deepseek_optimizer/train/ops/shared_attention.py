"""Attention in which one row per token or entry is key and value of all heads, with sinks (DeepSeek-V4). Saves one number per
query and head instead of its weights.

    w_tj = exp(scale q_t k_j + mask_tj) / (exp(sink) + sum_i exp(scale q_t k_i + mask_ti)),    o_t = sum_j w_tj k_j

Works in blocks of queries, each with the rows that one of them attends to, so that other rows cost nothing. As in
FlashAttention-2 (Dao 2023, arXiv 2307.08691), the backward pass computes the weights again. The products of all heads of a
block are one product, since they share the rows. Powers are those of 2: torch's `exp` takes six times as long for scores that
are masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from .product import product

_ROWS: Final = 1024  # queries of all heads in a block
_MOST: Final = 128  # tokens in a block; more tokens attend to more rows
_LOG2_E: Final = math.log2(math.e)


def shared_attention(
    q: torch.Tensor, rows: torch.Tensor, masks: Sequence[torch.Tensor], sinks: torch.Tensor, scale: float
) -> torch.Tensor:
    """[B, S, H, D] of q's dtype.

    Args:
        q: [B, S, H, D].
        rows: [B, K, D] of q's dtype.
        masks: parts of the mask [B or 1, 1, S, K], side by side, which is added to the scores; a number below half the lowest
            one of its dtype is taken for -inf.
        sinks: [H].
        scale: factor of the products.
    """
    result: torch.Tensor = _SharedAttention.apply(q, rows, sinks, scale, *masks)
    return result


def shared_attention_reference(
    q: torch.Tensor, rows: torch.Tensor, masks: Sequence[torch.Tensor], sinks: torch.Tensor, scale: float
) -> torch.Tensor:
    """`shared_attention` in plain torch."""
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = torch.cat([part.to(wide).expand(len(q), -1, -1, -1) for part in masks], -1)
    scores = torch.einsum("bshd,bkd->bhsk", q.to(wide), rows.to(wide)) * scale + mask
    all_scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)), -1)
    return torch.einsum("bhsk,bkd->bshd", all_scores.softmax(-1)[..., :-1], rows.to(wide)).to(q.dtype)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, rows: torch.Tensor, sinks: torch.Tensor, scale: float, *masks: torch.Tensor
    ) -> torch.Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        out, totals = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=exact)
        powers = sinks.to(exact) * _LOG2_E
        for at, seen, mask in _blocks(q, masks):
            keys = rows[at[0]].index_select(0, seen)
            scores = _scores(q[at], keys, mask, scale, exact)
            largest = scores.amax(-1).maximum(powers) if len(seen) else powers.expand(scores.shape[:2])
            weights = scores.sub_(largest[..., None]).exp2_()
            total = weights.sum(-1).add_((powers - largest).exp2_())
            weights.div_(total[..., None])
            totals[at] = largest + total.log2_()
            out[at] = product("nn", weights.flatten(0, 1), keys, dtype=q.dtype).view(out[at].shape)
        ctx.save_for_backward(q, rows, sinks, out, totals, *masks)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, rows, sinks, out, totals, *masks = ctx.saved_tensors
        exact, width = totals.dtype, q.shape[3]
        powers = sinks.to(exact) * _LOG2_E
        dq, drows, dsinks = torch.empty_like(q), torch.zeros_like(rows, dtype=exact), torch.zeros_like(sinks, dtype=exact)
        for at, seen, mask in _blocks(q, masks):
            keys, upstream = rows[at[0]].index_select(0, seen), grads[0][at].contiguous()
            weights = _scores(q[at], keys, mask, ctx.scale, exact).sub_(totals[at][..., None]).exp2_()
            weights, flat = weights.flatten(0, 1), upstream.view(-1, width)
            inner = (upstream.to(exact) * out[at]).sum(-1)
            dsinks -= ((powers - totals[at]).exp2_() * inner).sum(0)
            dscores = product("nt", flat, keys, dtype=exact).sub_(inner.view(-1, 1)).mul_(weights).mul_(ctx.scale)
            dq[at] = product("nn", dscores, keys, dtype=q.dtype).view(upstream.shape)
            dkeys = product("tn", weights, flat, dtype=exact)
            product("tn", dscores, q[at].reshape(-1, width), out=dkeys, add=True)
            drows[at[0]].index_add_(0, seen, dkeys)
        return dq, drows.to(rows.dtype), dsinks.to(sinks.dtype), None, *(None for _ in masks)


def _blocks(q: torch.Tensor, masks: Sequence[torch.Tensor]) -> Iterator[tuple[tuple[int, slice], torch.Tensor, torch.Tensor]]:
    """For each block of queries its place in q, the rows that one of its queries attends to, and its mask for these rows."""
    batch, tokens, heads, _ = q.shape
    step = max(1, min(_MOST, _ROWS // heads))
    lowest = [torch.finfo(mask.dtype).min / 2 for mask in masks]
    for b in range(batch):
        for begin in range(0, tokens, step):
            queries = slice(begin, begin + step)
            parts = [mask[min(b, len(mask) - 1), 0, queries] for mask in masks]
            seen = torch.cat([(part > low).any(0) for part, low in zip(parts, lowest, strict=True)]).nonzero()[:, 0]
            yield (b, queries), seen, torch.cat(parts, -1).index_select(1, seen)


def _scores(q: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """[S, H, K] of a block, as powers of 2."""
    scores = product("nt", q.reshape(-1, q.shape[-1]), keys, dtype=dtype).mul_(scale * _LOG2_E)
    return scores.view(*q.shape[:2], -1).add_(mask[:, None], alpha=_LOG2_E)
