"""Building blocks of decoders as graph nodes: embedding, layers, attention, gated MLP, head.

Every function appends its nodes to a list and returns their output. Weights are named by their module path in Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..graph.ir import CacheSpec, Graph, LatentSpec, Node, StateSpec, Value
from .decoder import Decoder, Trunk

# (nodes, input, RoPE's table, layer) -> output
Attend = Callable[[list[Node], Value, Value, int], Value]
# (nodes, input, layer) -> output
FeedForward = Callable[[list[Node], Value, int], Value]


def decoder_graph(d: Decoder) -> Graph:
    """The unfused graph of a decoder whose attention has keys and values per head."""

    def attend(nodes: list[Node], x: Value, table: Value, layer: int) -> Value:
        return attention(nodes, d, x, table, layer, AttentionLayer(f"model.layers.{layer}.self_attn", layer))

    def feed_forward(nodes: list[Node], x: Value, layer: int) -> Value:
        return mlp(nodes, d, x, f"l{layer}.mlp", f"model.layers.{layer}.mlp", d.intermediate)

    return trunk_graph(d, CacheSpec(d.layers, d.kv_heads, d.head_dim), attend, feed_forward)


@dataclass(frozen=True)
class Norms:
    """The norms of a decoder.

    Attributes:
        before_attention, before_mlp: names of a layer's norms.
        final: path of the norm after the last layer.
        offset: added to the weights of these norms.
    """

    before_attention: str = "input_layernorm"
    before_mlp: str = "post_attention_layernorm"
    final: str = "model.norm"
    offset: float = 0.0


def trunk_graph(
    d: Trunk,
    cache: CacheSpec | LatentSpec,
    attend: Attend,
    feed_forward: FeedForward,
    norms: Norms = Norms(),
    states: tuple[StateSpec, ...] = (),
) -> Graph:
    """The unfused graph of a model of pre-norm decoder layers.

    Args:
        d: the model's sizes.
        cache: the contents of the KV cache.
        attend, feed_forward: append the nodes of a layer's attention and feed-forward network.
        norms: the decoder's norms.
        states: the recurrent states of a sequence.
    """
    nodes: list[Node] = []
    x = emit(nodes, "embedding", (), "embed", d.hidden, "model.embed_tokens.weight", scale=1.0)
    table = emit(nodes, "rope_table", (), "rope", d.rope.rot, rope=d.rope)
    for layer in range(d.layers):
        nodes.append(Node("hidden_out", (x,), attrs={"index": layer}))
        x = decoder_layer(nodes, d, x, table, layer, attend, feed_forward, norms)
    normed = norm(nodes, x, "final", norms.final, d.eps, norms.offset)
    nodes.append(Node("hidden_out", (normed,), attrs={"index": d.layers}))
    head = "model.embed_tokens.weight" if d.tied else "lm_head.weight"
    emit(nodes, "lm_head", (normed,), "logits", d.vocab, head, bias=None)
    return Graph(d.family, nodes, d.vocab, d.hidden, d.layers + 1, cache, d.max_positions, states)


def decoder_layer(
    nodes: list[Node],
    d: Trunk,
    x: Value,
    table: Value,
    layer: int,
    attend: Attend,
    feed_forward: FeedForward,
    norms: Norms = Norms(),
) -> Value:
    """y = x + attention(norm(x)); the output is y + MLP(norm(y))."""
    name, path = f"l{layer}", f"model.layers.{layer}"
    normed = norm(nodes, x, f"{name}.attn_in", f"{path}.{norms.before_attention}", d.eps, norms.offset)
    x = add(nodes, x, attend(nodes, normed, table, layer), f"{name}.attn_out")
    normed = norm(nodes, x, f"{name}.mlp_in", f"{path}.{norms.before_mlp}", d.eps, norms.offset)
    return add(nodes, x, feed_forward(nodes, normed, layer), f"{name}.out")


def emit(
    nodes: list[Node], op: str, inputs: tuple[Value, ...], name: str, width: int, weight: str = "", /, **attrs: Any
) -> Value:
    """Appends a node with one output and at most one weight, and returns the output."""
    out = Value(name, width)
    nodes.append(Node(op, inputs, (out,), (weight,) if weight else (), attrs))
    return out


def linear(nodes: list[Node], x: Value, name: str, width: int, path: str, bias: bool = False) -> Value:
    return emit(nodes, "linear", (x,), name, width, f"{path}.weight", biases=(f"{path}.bias" if bias else None,))


def norm(nodes: list[Node], x: Value, name: str, path: str, eps: float, offset: float = 0.0) -> Value:
    return emit(nodes, "rms_norm", (x,), name, x.width, f"{path}.weight", eps=eps, **offset_attr(offset))


def offset_attr(offset: float) -> dict[str, float]:
    """The attribute `offset` of a norm, if it has one."""
    return {"offset": offset} if offset else {}


def add(nodes: list[Node], x: Value, delta: Value, name: str) -> Value:
    return emit(nodes, "add", (x, delta), name, x.width)


def mlp(
    nodes: list[Node],
    d: Trunk,
    x: Value,
    name: str,
    path: str,
    width: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Value:
    """W_down (silu(W_gate x) * (W_up x)); `width`: size of the intermediate result; `names`: of the three matrices."""
    gate = linear(nodes, x, f"{name}.gate", width, f"{path}.{names[0]}", d.mlp_bias)
    up = linear(nodes, x, f"{name}.up", width, f"{path}.{names[1]}", d.mlp_bias)
    hidden = emit(nodes, "swiglu", (gate, up), f"{name}.h", width)
    return linear(nodes, hidden, f"{name}.down", d.hidden, f"{path}.{names[2]}", d.mlp_bias)


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention with keys and values per head.

    Attributes:
        path: path of its module.
        cache_layer: its layer of the cache.
        o_proj, qk_norms: names of the output projection and of the norms of q and k.
        norm_offset: added to the weights of these norms.
        gated: q_proj also computes a gate per head, next to each query head; the result is multiplied by its sigmoid.
    """

    path: str
    cache_layer: int
    o_proj: str = "o_proj"
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    norm_offset: float = 0.0
    gated: bool = False


def attention(nodes: list[Node], d: Decoder, x: Value, table: Value, layer: int, form: AttentionLayer) -> Value:
    """Projections, q/k norm, RoPE, cache write, causal attention, gate, output projection."""
    name, path = f"l{layer}", form.path
    heads = {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}
    widths = {p: n * d.head_dim for p, n in heads.items()}
    if form.gated:
        widths["q"] *= 2
    qkv = {p: linear(nodes, x, f"{name}.{p}", width, f"{path}.{p}_proj", d.qkv_bias) for p, width in widths.items()}
    if form.gated:
        parts = {"q": (0, d.head_dim), "gate": (d.head_dim, 2 * d.head_dim)}
        qkv |= {
            p: emit(nodes, "columns", (qkv["q"],), f"{name}.{p}_part", widths["q"] // 2, groups=d.heads, begin=begin, end=end)
            for p, (begin, end) in parts.items()
        }
    for p, norm_name in zip("qk", form.qk_norms, strict=True):
        shape = {"heads": heads[p], "head_dim": d.head_dim}
        if d.qk_norm:
            qkv[p] = emit(
                nodes, "head_norm", (qkv[p],), f"{name}.{p}_norm", qkv[p].width, f"{path}.{norm_name}.weight", eps=d.eps,
                **shape, **offset_attr(form.norm_offset),
            )  # fmt: skip
        qkv[p] = emit(nodes, "rope", (qkv[p], table), f"{name}.{p}_rope", qkv[p].width, interleaved=False, **shape)
    cache = {"layer": form.cache_layer, "kv_heads": d.kv_heads, "head_dim": d.head_dim}
    nodes.append(Node("cache_write", (qkv["k"], qkv["v"]), attrs=cache))
    attended = emit(
        nodes, "attention", (qkv["q"],), f"{name}.attn", qkv["q"].width, heads=d.heads, scale=d.head_dim**-0.5,
        window=d.windows[layer], softmax="eager", **cache,
    )  # fmt: skip
    if form.gated:
        attended = emit(nodes, "sigmoid_gate", (qkv["gate"], attended), f"{name}.attn_gated", attended.width)
    return linear(nodes, attended, f"{name}.o", d.hidden, f"{path}.{form.o_proj}", d.o_bias)
