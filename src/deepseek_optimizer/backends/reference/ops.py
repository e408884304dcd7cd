"""The standard ops over rows [T, width], each written as its formula, independent of graphs, caches and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from ..base import BLOCK_TOKENS


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean in float32, rounded to x's dtype before the product. With
    `unit_offset`, 1 + weight replaces the weight, and only the product is rounded."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1 + weight.float())).to(x.dtype) if unit_offset else weight * normed.to(x.dtype)


def head_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, heads: int, unit_offset: bool = False) -> torch.Tensor:
    """rms_norm of each head; None: a weight of ones."""
    by_head = x.unflatten(-1, (heads, -1))
    weight = by_head.new_ones(by_head.shape[-1]) if weight is None else weight
    return rms_norm(by_head, weight, eps, unit_offset).flatten(-2)


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> torch.Tensor:
    """cos and sin of position * inv_freq, float32 [T, rot]: cos first. The angle is a float32 product, as in Transformers.

    Args:
        positions: int64 [T], or [T, rot/2] for positions per frequency.
        inv_freq: float32 [rot/2], or [T, rot/2] for frequencies per row.
    """
    by_frequency = positions if positions.ndim == 2 else positions[:, None]
    angle = (by_frequency.float() * inv_freq).double()
    return (torch.cat((angle.cos(), angle.sin()), -1) * scaling).float()


def position_scale(x: torch.Tensor, positions: torch.Tensor, beta: float, length: int, offset: int = 0) -> torch.Tensor:
    """(1 + beta * log(1 + floor((position + offset) / length))) * x; the factor in float32, rounded to x's dtype.

    Args:
        x: [T, width].
        positions: int64 [T].
    """
    factor = 1 + beta * torch.log1p(torch.floor((positions.float() + offset) / length))
    return x * factor[:, None].to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rope(x: torch.Tensor, table: torch.Tensor, heads: int, interleaved: bool, offset: int = 0) -> torch.Tensor:
    """Rotates elements [offset, offset + rot) of each head: pairs (i, i + rot/2), or (2i, 2i + 1) if interleaved."""
    rot = table.shape[-1]
    cos, sin = (part[:, None, :].to(x.dtype) for part in table.chunk(2, -1))
    by_head = x.unflatten(-1, (heads, -1))
    before, x_rot, after = by_head.tensor_split((offset, offset + rot), -1)
    if interleaved:
        a, b = x_rot[..., 0::2], x_rot[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x_rot.chunk(2, -1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((before, rotated, after), -1).flatten(-2)


def visible(
    queries: int,
    context: int,
    keys: torch.Tensor,
    window: int = 0,
    sinks: int = 0,
    chunked: bool = False,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool [queries, keys]: the visible keys. Query i is token context + i; it sees all tokens up to itself, or with a window
    the last `window` of these and the first `sinks`; if `chunked`, those of its own chunk of `window` tokens.

    Args:
        keys: int64 [keys], indices of the keys' tokens in the sequence.
        ends: int64 [queries], one past the last token that each query sees; None: its own.
    """
    query = torch.arange(context, context + queries, device=keys.device, dtype=torch.int64)[:, None]
    seen = keys <= query if ends is None else keys < ends[:, None]
    if chunked:
        return seen & (keys >= query - query % window)
    return seen & ((keys > query - window) | (keys < sinks)) if window else seen


def newest(queries: int, context: int, keys: torch.Tensor, count: int, ends: torch.Tensor | None = None) -> torch.Tensor:
    """bool [queries, keys]: the last `count` keys up to the last one that each query sees. Arguments as in `visible`."""
    own = torch.arange(context, context + queries, device=keys.device, dtype=torch.int64) + 1
    end = (own if ends is None else ends)[:, None]
    return (keys < end) & (keys >= end - count)


def visible_blocks(
    queries: int, context: int, window: int, sinks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the sequence's blocks that may hold visible tokens, and of all tokens in these: int64, ascending."""
    total = context + queries
    blocks = torch.arange(-(-total // BLOCK_TOKENS), device=device, dtype=torch.int64)
    if window:
        first = max(0, context + 1 - window) // BLOCK_TOKENS
        blocks = blocks[(blocks >= first) | (blocks < -(-sinks // BLOCK_TOKENS))]
    tokens = (blocks[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=device, dtype=torch.int64)).flatten()
    return blocks, tokens[tokens < total]


def visible_both_sides(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [tokens, tokens]: all of them, or with a window those at most `window` tokens apart."""
    index = torch.arange(tokens, device=device, dtype=torch.int64)
    apart = (index[:, None] - index).abs()
    return apart <= (window or tokens)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v with the whole score matrix.

    Args:
        q: float32 [queries, kv_heads, group, head_dim]: the `group` query heads that share a K and V.
        k: float32 [keys, kv_heads, head_dim].
        v: float32 [keys, kv_heads, v_dim].
        mask: bool [queries, keys], True where a query sees a key; or [queries, kv_heads, keys].
        softcap: c: c * tanh(s / c) replaces a score s; 0: none.
        sink: float32 [kv_heads, group], a further logit per head, in the softmax's denominator only.

    Returns: float32 [queries, kv_heads, group, v_dim].
    """
    scores = _scores(q, k, mask, scale, softcap)
    if sink is not None:
        scores = torch.cat((scores, sink.expand(len(q), -1, -1)[..., None]), -1)
    return torch.einsum("qhgk,khd->qhgd", torch.softmax(scores, -1)[..., : len(k)], v)


def attention_online(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` without a score matrix: keys in blocks of 32, ascending, with a running maximum and sum (Milakov and
    Gimelshein 2018): m' = max(m, max s); l' = l e^(m - m') + sum e^(s - m'); o' = o e^(m - m') + e^(s - m') v."""
    m = q.new_full(q.shape[:-1], -torch.inf) if sink is None else sink.expand(len(q), -1, -1)
    total, out = (m > -torch.inf).to(q.dtype), q.new_zeros((*q.shape[:-1], v.shape[-1]))
    for begin in range(0, len(k), BLOCK_TOKENS):
        block = slice(begin, begin + BLOCK_TOKENS)
        scores = _scores(q, k[block], mask[..., block], scale, softcap)
        top = torch.maximum(m, scores.amax(-1))
        shift = torch.where(top == -torch.inf, 0.0, top)  # no visible key so far: e^(-inf - shift) must be 0, not NaN
        weight = torch.exp(scores - shift[..., None])
        fade = torch.exp(m - shift)
        total = total * fade + weight.sum(-1)
        out = out * fade[..., None] + torch.einsum("qhgk,khd->qhgd", weight, v[block])
        m = top
    return out / total[..., None]


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    scores = torch.einsum("qhgd,khd->qhgk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    by_head = mask if mask.ndim == 3 else mask[:, None]
    return scores.masked_fill(~by_head[:, :, None], -torch.inf)


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y."""
    return x + y


def concat(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The elements of x, then those of y, row by row."""
    return torch.cat((x, y), -1)


def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x * y."""
    return x * y


def columns(x: torch.Tensor, groups: int, begin: int, end: int) -> torch.Tensor:
    """Elements [begin, end) of each of the equal parts of a row."""
    return x.unflatten(-1, (groups, -1))[..., begin:end].flatten(-2)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def clamped_swiglu(
    gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, raised: bool = False
) -> torch.Tensor:
    """u * g * sigmoid(alpha * g), where g = min(gate, limit) and u is up limited to [-limit, limit], plus 1 if `raised`."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1 if raised else up) * (gate * torch.sigmoid(gate * alpha))


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up."""
    return gelu(gate) * up


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


def gelu_erf(x: torch.Tensor) -> torch.Tensor:
    """x / 2 * (1 + erf(x / sqrt(2)))."""
    return F.gelu(x)


def relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)."""
    return F.relu(x)


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate); gate may have one element per row."""
    return x * torch.sigmoid(gate)


def scale(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x."""
    return x * scale


# Of gated products, by their attribute `activation`.
GATED: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"silu": swiglu, "gelu": geglu}


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [..., count]: indices of the largest elements of the last axis, largest first; ties go to the first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


# Ops with one output that depends only on inputs and attributes: called with the inputs, and the attributes by keyword.
FUNCTIONS: Mapping[str, Callable[..., torch.Tensor]] = {
    "add": add,
    "clamped_swiglu": clamped_swiglu,
    "columns": columns,
    "concat": concat,
    "geglu": geglu,
    "gelu": gelu,
    "gelu_erf": gelu_erf,
    "multiply": multiply,
    "relu": relu,
    "scale": scale,
    "sigmoid_gate": sigmoid_gate,
    "swiglu": swiglu,
}
