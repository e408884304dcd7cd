"""The pieces decoders are made of, as graph nodes: embedding, attention, gated MLP, head.

Every piece appends its nodes to a list and returns the value it made. Weights are named by their module path in Transformers.
"""

from __future__ import annotations

from typing import Any

from ..graph.ir import CacheSpec, Graph, Node, Value
from .decoder import Decoder


def decoder_graph(d: Decoder) -> Graph:
    """The unfused graph of a model of pre-norm decoder layers."""
    nodes: list[Node] = []
    x = _emit(nodes, "embedding", (), "embed", d.hidden, "model.embed_tokens.weight", scale=1.0)
    table = _emit(nodes, "rope_table", (), "rope", d.rope.rot, rope=d.rope)
    for layer in range(d.layers):
        nodes.append(Node("hidden_out", (x,), attrs={"index": layer}))
        name, path = f"l{layer}", f"model.layers.{layer}"
        normed = _norm(nodes, d, x, f"{name}.attn_in", f"{path}.input_layernorm")
        x = _add(nodes, x, _attention(nodes, d, normed, table, layer), f"{name}.attn_out")
        normed = _norm(nodes, d, x, f"{name}.mlp_in", f"{path}.post_attention_layernorm")
        x = _add(nodes, x, _mlp(nodes, d, normed, f"{name}.mlp", f"{path}.mlp"), f"{name}.out")
    normed = _norm(nodes, d, x, "final", "model.norm")
    nodes.append(Node("hidden_out", (normed,), attrs={"index": d.layers}))
    head = "model.embed_tokens.weight" if d.tied else "lm_head.weight"
    _emit(nodes, "lm_head", (normed,), "logits", d.vocab, head, bias=None)
    cache = CacheSpec(d.layers, d.kv_heads, d.head_dim)
    return Graph(d.family, nodes, d.vocab, d.hidden, d.layers + 1, cache, d.max_positions)


def _emit(
    nodes: list[Node], op: str, inputs: tuple[Value, ...], name: str, width: int, weight: str = "", /, **attrs: Any
) -> Value:
    """Appends a node with one output and at most one weight."""
    out = Value(name, width)
    nodes.append(Node(op, inputs, (out,), (weight,) if weight else (), attrs))
    return out


def _linear(nodes: list[Node], x: Value, name: str, width: int, path: str, bias: bool) -> Value:
    return _emit(nodes, "linear", (x,), name, width, f"{path}.weight", biases=(f"{path}.bias" if bias else None,))


def _norm(nodes: list[Node], d: Decoder, x: Value, name: str, path: str) -> Value:
    return _emit(nodes, "rms_norm", (x,), name, x.width, f"{path}.weight", eps=d.eps)


def _add(nodes: list[Node], x: Value, delta: Value, name: str) -> Value:
    return _emit(nodes, "add", (x, delta), name, x.width)


def _attention(nodes: list[Node], d: Decoder, x: Value, table: Value, layer: int) -> Value:
    """Projections, q/k norm, RoPE, cache write, causal attention, output projection."""
    name, path = f"l{layer}", f"model.layers.{layer}.self_attn"
    heads = {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}
    made = {p: _linear(nodes, x, f"{name}.{p}", n * d.head_dim, f"{path}.{p}_proj", d.qkv_bias) for p, n in heads.items()}
    for p in "qk":
        shape = {"heads": heads[p], "head_dim": d.head_dim}
        if d.qk_norm:
            weight = f"{path}.{p}_norm.weight"
            made[p] = _emit(nodes, "head_norm", (made[p],), f"{name}.{p}_norm", made[p].width, weight, eps=d.eps, **shape)
        made[p] = _emit(nodes, "rope", (made[p], table), f"{name}.{p}_rope", made[p].width, interleaved=False, **shape)
    cache = {"layer": layer, "kv_heads": d.kv_heads, "head_dim": d.head_dim}
    nodes.append(Node("cache_write", (made["k"], made["v"]), attrs=cache))
    attended = _emit(
        nodes, "attention", (made["q"],), f"{name}.attn", made["q"].width, heads=d.heads, scale=d.head_dim**-0.5,
        window=d.windows[layer], softmax="eager", **cache,
    )  # fmt: skip
    return _linear(nodes, attended, f"{name}.o", d.hidden, f"{path}.o_proj", d.o_bias)


def _mlp(nodes: list[Node], d: Decoder, x: Value, name: str, path: str) -> Value:
    """W_down (silu(W_gate x) * (W_up x))."""
    gate = _linear(nodes, x, f"{name}.gate", d.intermediate, f"{path}.gate_proj", d.mlp_bias)
    up = _linear(nodes, x, f"{name}.up", d.intermediate, f"{path}.up_proj", d.mlp_bias)
    hidden = _emit(nodes, "swiglu", (gate, up), f"{name}.h", d.intermediate)
    return _linear(nodes, hidden, f"{name}.down", d.hidden, f"{path}.down_proj", d.mlp_bias)
