"""An MTP layer of DeepSeek-V4 in plain torch, after DeepSeek's own code for V4 (`MTPBlock` of inference/model.py).

Weights have their published names without the beginning `mtp.N.`. Whole texts, from position 0; one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

# Parts of Transformers' names and of the published ones, replaced in this order.
_PUBLISHED = (
    (".self_attn.", ".attn."), (".mlp.", ".ffn."), (".shared_head.norm.", ".norm."), (".hc_head.hc_", ".hc_head_"),
    (".attn_hc.", ".hc_attn_"), (".ffn_hc.", ".hc_ffn_"), ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("q_a_proj", "wq_a"), ("q_b_proj", "wq_b"), ("kv_proj", "wkv"),
    ("o_a_proj", "wo_a"), ("o_b_proj", "wo_b"), ("q_a_norm", "q_norm"), (".sinks", ".attn_sink"),
    ("e_score_correction_bias", "bias"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"),
)  # fmt: skip


def published_name(name: str, layers: int) -> str:
    """The name that a tensor of an MTP layer has in DeepSeek's own checkpoints of V4.

    Args:
        name: `model.layers.N.*`, where N is at least `layers`, with one tensor per expert.
        layers: number of decoder layers.
    """
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    rest = f".{rest}"
    for ours, theirs in _PUBLISHED:
        rest = rest.replace(ours, theirs)
    return f"mtp.{int(number) - layers}{rest}"


def mtp_layer(w: Mapping[str, torch.Tensor], config: Any, embedded: torch.Tensor, streams: torch.Tensor) -> Any:
    """The streams [T, n, H] after the layer, and its normed hidden states [T, H].

    Args:
        w: weights.
        config: a `DeepseekV4Config`.
        embedded: [T, H], embeddings of the tokens after those of the rows.
        streams: [T, n, H], of the model or of the MTP layer before.
    """
    norm, eps = _rms_norm, config.rms_norm_eps
    embedded = norm(embedded, w["enorm.weight"], eps) @ w["e_proj.weight"].T
    x = embedded[:, None] + norm(streams, w["hnorm.weight"], eps) @ w["h_proj.weight"].T
    for block, run in (("attn", _attention), ("ffn", _experts)):
        pre, post, comb = _weights(w, config, x, f"hc_{block}")
        collapsed = (pre[..., None] * x).sum(1)
        y = run(w, config, norm(collapsed, w[f"{block}_norm.weight"], eps))
        x = post[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, x)
    pre = _weights(w, config, x, "hc_head")[0]
    return x, norm((pre[..., None] * x).sum(1), w["norm.weight"], eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | float, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _weights(w: Mapping[str, torch.Tensor], config: Any, x: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
    n, eps = config.hc_mult, config.hc_eps
    mixes = _rms_norm(x.flatten(1), 1.0, config.rms_norm_eps) @ w[f"{name}_fn"].T
    base, scale = w[f"{name}_base"], w[f"{name}_scale"]
    pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + eps
    if name == "hc_head":
        return (pre,)
    post = 2 * torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n).softmax(-1) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return pre, post, comb


def _rotated(x: torch.Tensor, config: Any, sign: float = 1.0) -> torch.Tensor:
    """x [T, heads, head_dim] with its last elements rotated in pairs (2i, 2i + 1); `sign` -1: backwards."""
    rot = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, rot, 2, dtype=x.dtype) / rot)
    angles = sign * torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies
    pairs = torch.view_as_complex(x[..., -rot:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
    return torch.cat((x[..., :-rot], turned), -1)


def _attention(w: Mapping[str, torch.Tensor], config: Any, x: torch.Tensor) -> torch.Tensor:
    heads, eps, tokens = config.num_attention_heads, config.rms_norm_eps, torch.arange(len(x))
    latent = _rms_norm(x @ w["attn.wq_a.weight"].T, w["attn.q_norm.weight"], eps)
    q = _rotated(_rms_norm((latent @ w["attn.wq_b.weight"].T).unflatten(-1, (heads, -1)), 1.0, eps), config)
    row = _rotated(_rms_norm(x @ w["attn.wkv.weight"].T, w["attn.kv_norm.weight"], eps)[:, None], config)[:, 0]
    scores = torch.einsum("thd,sd->ths", q, row) * config.head_dim**-0.5
    behind = tokens[:, None] - tokens
    hidden = (behind < 0) | (behind >= config.sliding_window)
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    sinks = w["attn.attn_sink"].expand(len(x), heads)[..., None]
    shares = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    attended = _rotated(torch.einsum("ths,sd->thd", shares, row), config, -1.0).flatten(1)
    grouped = attended.unflatten(-1, (config.o_groups, -1))
    made = torch.einsum("tgd,grd->tgr", grouped, w["attn.wo_a.weight"].unflatten(0, (config.o_groups, -1)))
    return made.flatten(1) @ w["attn.wo_b.weight"].T


def _experts(w: Mapping[str, torch.Tensor], config: Any, x: torch.Tensor) -> torch.Tensor:
    scores = F.softplus(x @ w["ffn.gate.weight"].T).sqrt()
    chosen = (scores + w["ffn.gate.bias"]).topk(config.num_experts_per_tok, -1).indices
    weights = scores.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor
    routed = [
        sum(weight * _expert(w, config, row, f"ffn.experts.{int(e)}") for weight, e in zip(*pair, strict=True))
        for row, *pair in zip(x, weights, chosen, strict=True)
    ]
    return torch.stack(routed) + _expert(w, config, x, "ffn.shared_experts")


def _expert(w: Mapping[str, torch.Tensor], config: Any, x: torch.Tensor, name: str) -> torch.Tensor:
    limit = config.swiglu_limit
    gate = (x @ w[f"{name}.w1.weight"].T).clamp(max=limit)
    up = (x @ w[f"{name}.w3.weight"].T).clamp(-limit, limit)
    return (F.silu(gate) * up) @ w[f"{name}.w2.weight"].T
