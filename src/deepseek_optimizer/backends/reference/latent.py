"""Multi-head latent attention and its indexer. Source: DeepSeek-V2, section 2.1; DeepSeek-V3.2, section 2.1."""

from __future__ import annotations

import torch

from . import ops


def latent(x: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, eps: float, interleaved: bool) -> torch.Tensor:
    """[T, rank + rope]: RMS norm of the first `rank` elements, rotation of the others."""
    normed, rotated = x.tensor_split((len(weight),), -1)
    return torch.cat((ops.rms_norm(normed, weight, eps), ops.rope(rotated, table, 1, interleaved)), -1)


def attend_expanded(q: torch.Tensor, kv: torch.Tensor, rotated: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention over keys and values of every head.

    Args:
        q: float32 [queries, heads, nope + rope].
        kv: float32 [keys, heads, nope + v_dim], computed from the latents.
        rotated: rotated keys, float32 [keys, rope], shared by all heads.
        mask: bool [queries, keys].

    Returns: float32 [queries, heads, v_dim].
    """
    nope = q.shape[-1] - rotated.shape[-1]
    k = torch.cat((kv[..., :nope], rotated[:, None].expand(-1, q.shape[1], -1)), -1)
    return ops.attention(q.unsqueeze(2), k, kv[..., nope:], mask, scale).squeeze(2)


def attend_absorbed(
    q: torch.Tensor, latents: torch.Tensor, kv_b: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same directly on the latents: kv_b is applied to the queries and to the result.

    Args:
        latents: float32 [keys, rank + rope].
        kv_b: float32 [heads, nope + v_dim, rank].
    """
    rank = kv_b.shape[-1]
    nope = q.shape[-1] - (latents.shape[-1] - rank)
    keys = latents[:, None]  # one kv head, shared by all query heads
    mixed = ops.attention_online(absorbed(q, kv_b, nope)[:, None], keys, keys[..., :rank], mask, scale)[:, 0]
    return torch.einsum("qhr,hvr->qhv", mixed, kv_b[:, nope:])


def absorbed(q: torch.Tensor, kv_b: torch.Tensor, nope: int) -> torch.Tensor:
    """Maps queries [queries, heads, nope + rope] to the space of latent rows, [queries, heads, rank + rope]."""
    return torch.cat((torch.einsum("qhn,hnr->qhr", q[..., :nope], kv_b[:, :nope]), q[..., nope:]), -1)


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * sum over heads, ascending, of weight_h relu(q_h . k), float32 [queries, keys].

    Args:
        q: float32 [queries, heads, index].
        weights: float32 [queries, heads].
        keys: float32 [keys, index].
    """
    total = q.new_zeros(len(q), len(keys))
    for head in range(q.shape[1]):
        total += weights[:, head, None] * torch.relu(q[:, head] @ keys.T)
    return total * scale


def choose(scores: torch.Tensor, mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """Indices of the top_k visible keys (`mask`) with the largest scores, ascending, -1 after the last: float32
    [queries, top_k]. Ties go to the earlier key."""
    keys = scores.shape[-1]
    best = ops.best(scores.masked_fill(~mask, -torch.inf), min(top_k, keys))
    visible = torch.arange(best.shape[-1], device=best.device, dtype=torch.int64) < mask.sum(-1, keepdim=True)
    ascending = torch.where(visible, best, keys).sort(-1).values
    chosen = scores.new_full((len(scores), top_k), -1.0)
    chosen[:, : best.shape[-1]] = torch.where(ascending == keys, -1, ascending).to(chosen.dtype)
    return chosen


def chosen_keys(chosen: torch.Tensor, keys: int) -> torch.Tensor:
    """bool [queries, keys]: whether a key is among the chosen."""
    places = torch.where(chosen < 0, keys, chosen).long()
    mask = torch.zeros(len(chosen), keys + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, places, True)[:, :keys]
