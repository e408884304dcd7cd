"""Hyper-connections. Source: Xie et al. 2026, mHC; `graph/ops/streams.py` has the formulas."""

from __future__ import annotations

import torch


def weights(x: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, count: int, steps: int, eps: float) -> torch.Tensor:
    """The weights of a hyper-connection, float32 [T, count] or [T, (2 + count) * count].

    Args:
        x: [T, as many].
        bias: [as many].
        scale: [1] or [3].
        count: number of streams.
        steps: normalizations of the columns of the mixing matrices.
        eps: added to weights and sums.
    """
    x, bias, scale = x.float(), bias.float(), scale.float()
    pre = torch.sigmoid(x[:, :count] * scale[0] + bias[:count]) + eps
    if x.shape[-1] == count:
        return pre
    post = 2 * torch.sigmoid(x[:, count : 2 * count] * scale[1] + bias[count : 2 * count])
    comb = (x[:, 2 * count :] * scale[2] + bias[2 * count :]).unflatten(-1, (count, count)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(steps - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return torch.cat((pre, post, comb.flatten(1)), -1)


def collapse(streams: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """sum over i of pre_i S_i, [T, H]."""
    by_stream = streams.unflatten(-1, (count, -1))
    return (weights[:, :count, None] * by_stream).sum(1).to(streams.dtype)


def expand(streams: torch.Tensor, weights: torch.Tensor, y: torch.Tensor, count: int) -> torch.Tensor:
    """post_k y + sum over j of comb_jk S_j, [T, count * H]."""
    dtype, by_stream = streams.dtype, streams.unflatten(-1, (count, -1))
    post, comb = weights[:, count : 2 * count].to(dtype), weights[:, 2 * count :].unflatten(-1, (count, count)).to(dtype)
    return (post[..., None] * y[:, None] + comb.transpose(1, 2) @ by_stream).flatten(1)
