"""Block-sparse attention: chooses the blocks of 32 tokens that a row attends to by Quest's estimate (Tang et al. 2024, section
3.3). The rule is defined in `graph/ir.py`."""

from __future__ import annotations

import torch

from ..base import BLOCK_TOKENS
from . import ops


def summaries(keys: torch.Tensor, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The element-wise maximum and minimum of each full block's keys, float32 [blocks, heads, width].

    Args:
        keys: float32 [tokens, heads, width], as stored in the cache.
        exact: whether the cache is fp32; otherwise the summaries are rounded to bf16.
    """
    full = keys[: len(keys) // BLOCK_TOKENS * BLOCK_TOKENS].unflatten(0, (-1, BLOCK_TOKENS))
    largest, smallest = full.amax(1), full.amin(1)
    return (largest, smallest) if exact else (largest.bfloat16().float(), smallest.bfloat16().float())


def estimates(q: torch.Tensor, largest: torch.Tensor, smallest: torch.Tensor) -> torch.Tensor:
    """Upper bounds of q . k over the keys of each block: sum over d of max(q_d largest_d, q_d smallest_d), where the maximum is
    q_d largest_d for q_d > 0 and q_d smallest_d otherwise. float32 [queries, heads, group, blocks].

    Args:
        q: float32 [queries, heads, group, width].
        largest, smallest: the summaries, float32 [blocks, heads, width].
    """
    above = torch.einsum("qhgd,bhd->qhgb", q.clamp(min=0), largest)
    return above + torch.einsum("qhgd,bhd->qhgb", q.clamp(max=0), smallest)


def choose_blocks(
    q: torch.Tensor, keys: torch.Tensor, context: int, blocks: int, sinks: int, window: int, exact: bool
) -> torch.Tensor:
    """Indices of the blocks that each row attends to, ascending, -1 after the last: float32 [queries, heads, blocks].

    Args:
        q: float32 [queries, heads, group, width]; row i is token context + i.
        keys: float32 [context + queries, heads, width].
        context: tokens in the cache before these rows.
        blocks: number of blocks to choose.
        sinks, window: tokens whose blocks are always chosen.
        exact: see `summaries`.
    """
    row = torch.arange(context, context + len(q), device=q.device, dtype=torch.int64)[:, None]
    block = torch.arange(-(-len(keys) // BLOCK_TOKENS), device=q.device, dtype=torch.int64)
    before, first, last = -(-sinks // BLOCK_TOKENS), (row + 1 - window).clamp(min=0) // BLOCK_TOKENS, row // BLOCK_TOKENS
    visible, middle = block <= last, (block >= before) & (block < first)
    enough = last < blocks  # all visible blocks can be chosen
    left = blocks - before - (last + 1 - first)
    best = _ranked(estimates(q, *summaries(keys, exact)), middle) < left[..., None]
    chosen = torch.where(enough, visible, visible & ~middle)[:, None] | (best & middle[:, None])
    ascending = torch.where(chosen, block, len(block)).sort(-1).values[..., :blocks]
    indices = q.new_full((*q.shape[:2], blocks), -1.0)
    indices[..., : ascending.shape[-1]] = torch.where(ascending < len(block), ascending, -1).to(indices.dtype)
    return indices


def _ranked(estimate: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """The rank of each block among those of the middle, int64 [queries, heads, blocks]: 0 is the best. A block's score is the
    maximum over the group's heads of its estimate minus the head's largest estimate.

    Args:
        estimate: float32 [queries, heads, group, full blocks].
        middle: bool [queries, blocks].
    """
    score = estimate.new_full((*estimate.shape[:3], middle.shape[-1]), -torch.inf)
    score[..., : estimate.shape[-1]] = estimate
    score = score.masked_fill(~middle[:, None, None], -torch.inf)
    best = score.amax(-1, keepdim=True)
    relative = torch.where(middle[:, None, None], score - best, -torch.inf).amax(2)
    return ops.best(relative, relative.shape[-1]).argsort(-1)


def chosen_tokens(chosen: torch.Tensor, keys: int) -> torch.Tensor:
    """bool [queries, heads, keys]: whether a token is in one of the chosen blocks."""
    count = -(-keys // BLOCK_TOKENS)
    mask = torch.zeros(*chosen.shape[:2], count + 1, dtype=torch.bool, device=chosen.device)
    mask.scatter_(2, torch.where(chosen < 0, count, chosen).long(), True)
    return mask[..., :count].repeat_interleave(BLOCK_TOKENS, -1)[..., :keys]


def tokens_of(chosen: torch.Tensor, context: int) -> torch.Tensor:
    """Indices of the visible tokens of the chosen blocks, ascending, -1 in unused places: float32 [queries, 32 * blocks].

    Args:
        chosen: float32 [queries, blocks].
    """
    row = torch.arange(context, context + len(chosen), device=chosen.device, dtype=torch.int64)[:, None]
    tokens = (chosen[..., None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=chosen.device, dtype=torch.int64)).flatten(1)
    return torch.where((tokens < 0) | (tokens > row), -1.0, tokens)
