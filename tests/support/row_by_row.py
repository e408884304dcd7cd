"""Transformers' models with an attention mode, computed row by row in float64: the reference for our graphs.

Only the mode is shared with the package. The function replaces a model's eager attention, so everything before and after it is
Transformers' code.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from deepseek_optimizer.graph.attention_mode import AttentionMode
from support.models import transformers_logits

BLOCK = 32


def logits_in_mode(model: Any, ids: list[int], mode: AttentionMode) -> torch.Tensor:
    """float32 [T, V], from Transformers' forward over one text without a cache."""
    latents: dict[Any, torch.Tensor] = {}
    hooks = [
        layer.self_attn.kv_a_layernorm.register_forward_hook(
            lambda _, __, out, module=layer.self_attn: latents.update({module: out.flatten(0, -2)})
        )
        for layer in model.model.layers
        if hasattr(layer.self_attn, "kv_a_layernorm")
    ]

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> tuple[torch.Tensor, None]:
        q, k, v = (x[0].double() for x in (q, k, v))
        seen = _seen(module, q, k, latents.get(module), mode)
        group = len(q) // len(k)
        out = [
            [_weighted(q[h, i], k[h // group], v[h // group], seen[h][i], scaling) for h in range(len(q))]
            for i in range(q.shape[1])
        ]
        return torch.stack([torch.stack(row) for row in out])[None].float(), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", attend)
        try:
            return transformers_logits(model, ids)
        finally:
            for hook in hooks:
                hook.remove()


def _weighted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: list[int], scaling: float) -> torch.Tensor:
    return torch.softmax(k[seen] @ q * scaling, 0) @ v[seen]


def _seen(module: Any, q: Any, k: Any, latents: Any, mode: AttentionMode) -> list[list[list[int]]]:
    """The visible tokens of each query head and row."""
    rows, heads = range(q.shape[1]), range(len(q))
    own = getattr(module, "sliding_window", None)
    if own and (mode.kind != "sliding" or own <= mode.window):
        return [[list(range(max(0, i + 1 - own), i + 1)) for i in rows] for _ in heads]
    if mode.kind == "sliding":
        return [[[j for j in range(i + 1) if i - j < mode.window or j < mode.sinks] for i in rows] for _ in heads]
    if mode.kind == "flash":
        return [[list(range(i + 1)) for i in rows] for _ in heads]
    if latents is None:
        group, groups = len(q) // len(k), len(k)
        keys = k
    else:  # one key for all heads: the latent and the rotated part
        group, groups, nope = len(q), 1, module.qk_nope_head_dim
        keys = torch.cat((latents.double(), k[0, :, nope:]), -1)[None]
        of_head = module.kv_b_proj.weight.double().unflatten(0, (len(q), -1))[:, :nope]
        q = torch.cat((torch.einsum("htn,hnr->htr", q[..., :nope], of_head), q[..., nope:]), -1)
    chosen = [[_chosen(q[g * group : (g + 1) * group, i], keys[g], i, mode) for i in rows] for g in range(groups)]
    return [[[32 * b + n for b in chosen[h // group][i] for n in range(32) if 32 * b + n <= i] for i in rows] for h in heads]


def _chosen(q: torch.Tensor, keys: torch.Tensor, i: int, mode: AttentionMode) -> list[int]:
    """Indices of the blocks that are visible to a group of query heads [group, width] at token i."""
    count, budget = i // BLOCK + 1, mode.budget // BLOCK
    if count <= budget:
        return list(range(count))
    first, last = -(-mode.sinks // BLOCK), max(0, i + 1 - mode.window) // BLOCK
    always = [*range(first), *range(last, count)]
    scores: dict[int, float] = {}
    estimate = []
    for b in range(first, last):
        block = keys[BLOCK * b : BLOCK * (b + 1)]
        estimate.append(torch.maximum(q * block.amax(0), q * block.amin(0)).sum(-1))
    behind = torch.stack(estimate) - torch.stack(estimate).amax(0)
    scores = {b: float(s) for b, s in zip(range(first, last), behind.amax(-1), strict=True)}
    ranked = sorted(scores, key=lambda b: (-scores[b], b))
    return sorted([*always, *ranked[: budget - len(always)]])
