"""Building blocks of decoders as graph nodes: embedding, layers, attention, gated MLP, head.

Every function appends its nodes to a list and returns their output. Weights are named by their module path in Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..graph.ir import CacheSpec, Graph, LatentSpec, Node, Value
from .decoder import Decoder, Trunk

# (nodes, input, RoPE's table, layer) -> output
Attend = Callable[[list[Node], Value, Value, int], Value]
# (nodes, input, layer) -> output
FeedForward = Callable[[list[Node], Value, int], Value]


def decoder_graph(d: Decoder) -> Graph:
    """The unfused graph of a decoder whose attention has keys and values per head."""

    def attend(nodes: list[Node], x: Value, table: Value, layer: int) -> Value:
        return _attention(nodes, d, x, table, layer)

    def feed_forward(nodes: list[Node], x: Value, layer: int) -> Value:
        return mlp(nodes, d, x, f"l{layer}.mlp", f"model.layers.{layer}.mlp", d.intermediate)

    return trunk_graph(d, CacheSpec(d.layers, d.kv_heads, d.head_dim), attend, feed_forward)


def trunk_graph(d: Trunk, cache: CacheSpec | LatentSpec, attend: Attend, feed_forward: FeedForward) -> Graph:
    """The unfused graph of a model of pre-norm decoder layers.

    Args:
        d: the model's sizes.
        cache: the contents of the KV cache.
        attend, feed_forward: append the nodes of a layer's attention and feed-forward network.
    """
    nodes: list[Node] = []
    x = emit(nodes, "embedding", (), "embed", d.hidden, "model.embed_tokens.weight", scale=1.0)
    table = emit(nodes, "rope_table", (), "rope", d.rope.rot, rope=d.rope)
    for layer in range(d.layers):
        nodes.append(Node("hidden_out", (x,), attrs={"index": layer}))
        x = decoder_layer(nodes, d, x, table, layer, attend, feed_forward)
    normed = norm(nodes, x, "final", "model.norm", d.eps)
    nodes.append(Node("hidden_out", (normed,), attrs={"index": d.layers}))
    head = "model.embed_tokens.weight" if d.tied else "lm_head.weight"
    emit(nodes, "lm_head", (normed,), "logits", d.vocab, head, bias=None)
    return Graph(d.family, nodes, d.vocab, d.hidden, d.layers + 1, cache, d.max_positions)


def decoder_layer(
    nodes: list[Node], d: Trunk, x: Value, table: Value, layer: int, attend: Attend, feed_forward: FeedForward
) -> Value:
    """y = x + attention(norm(x)); the output is y + MLP(norm(y))."""
    name, path = f"l{layer}", f"model.layers.{layer}"
    normed = norm(nodes, x, f"{name}.attn_in", f"{path}.input_layernorm", d.eps)
    x = add(nodes, x, attend(nodes, normed, table, layer), f"{name}.attn_out")
    normed = norm(nodes, x, f"{name}.mlp_in", f"{path}.post_attention_layernorm", d.eps)
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


def norm(nodes: list[Node], x: Value, name: str, path: str, eps: float) -> Value:
    return emit(nodes, "rms_norm", (x,), name, x.width, f"{path}.weight", eps=eps)


def add(nodes: list[Node], x: Value, delta: Value, name: str) -> Value:
    return emit(nodes, "add", (x, delta), name, x.width)


def mlp(nodes: list[Node], d: Trunk, x: Value, name: str, path: str, width: int) -> Value:
    """W_down (silu(W_gate x) * (W_up x)); `width`: size of the intermediate result."""
    gate = linear(nodes, x, f"{name}.gate", width, f"{path}.gate_proj", d.mlp_bias)
    up = linear(nodes, x, f"{name}.up", width, f"{path}.up_proj", d.mlp_bias)
    hidden = emit(nodes, "swiglu", (gate, up), f"{name}.h", width)
    return linear(nodes, hidden, f"{name}.down", d.hidden, f"{path}.down_proj", d.mlp_bias)


def _attention(nodes: list[Node], d: Decoder, x: Value, table: Value, layer: int) -> Value:
    """Projections, q/k norm, RoPE, cache write, causal attention, output projection."""
    name, path = f"l{layer}", f"model.layers.{layer}.self_attn"
    heads = {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}
    qkv = {p: linear(nodes, x, f"{name}.{p}", n * d.head_dim, f"{path}.{p}_proj", d.qkv_bias) for p, n in heads.items()}
    for p in "qk":
        shape = {"heads": heads[p], "head_dim": d.head_dim}
        if d.qk_norm:
            weight = f"{path}.{p}_norm.weight"
            qkv[p] = emit(nodes, "head_norm", (qkv[p],), f"{name}.{p}_norm", qkv[p].width, weight, eps=d.eps, **shape)
        qkv[p] = emit(nodes, "rope", (qkv[p], table), f"{name}.{p}_rope", qkv[p].width, interleaved=False, **shape)
    cache = {"layer": layer, "kv_heads": d.kv_heads, "head_dim": d.head_dim}
    nodes.append(Node("cache_write", (qkv["k"], qkv["v"]), attrs=cache))
    attended = emit(
        nodes, "attention", (qkv["q"],), f"{name}.attn", qkv["q"].width, heads=d.heads, scale=d.head_dim**-0.5,
        window=d.windows[layer], softmax="eager", **cache,
    )  # fmt: skip
    return linear(nodes, attended, f"{name}.o", d.hidden, f"{path}.o_proj", d.o_bias)
