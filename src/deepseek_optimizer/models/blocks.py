"""Building blocks of decoders as graph nodes: embedding, layers, norms, MLP, head.

Every function appends its nodes to a list and returns their output. Weights are named by their module path in Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from ..graph.ir import CacheSpec, Graph, LatentSpec, Node, StateSpec, Value
from ..graph.ops.products import GATED
from .decoder import Trunk

# (nodes, input, RoPE's table or None for a layer without RoPE, layer) -> output
Attend = Callable[[list[Node], Value, "Value | None", int], Value]
# (nodes, input, layer) -> output
FeedForward = Callable[[list[Node], Value, int], Value]
LayerEnd = Callable[[list[Node], Value, int], Value]
Begin = Callable[[list[Node], Value], LayerEnd]


def trunk_graph(
    d: Trunk,
    cache: CacheSpec | LatentSpec,
    attend: Attend,
    feed_forward: FeedForward,
    states: tuple[StateSpec, ...] = (),
    begin: Begin | None = None,
) -> Graph:
    """The unfused graph of a decoder-only model.

    Args:
        d: the model's sizes.
        cache: the contents of the KV cache.
        attend, feed_forward: append the nodes of a layer's attention and feed-forward network.
        states: the recurrent states of a sequence.
        begin: given the embeddings, appends nodes that precede the first layer, and returns a function that appends the nodes
            after a layer, whose output is theirs; None: a layer's output is the residual.

    Raises:
        ConfigError: no layer has attention.
    """
    if not cache.layers:  # Transformers counts a sequence's tokens in the first layer with attention, and fails too
        raise ConfigError("config.layer_types: no layer has attention; at least one must be 'full_attention'")
    nodes: list[Node] = []
    x = emit(nodes, "embedding", (), "embed", d.hidden, "model.embed_tokens.weight", scale=d.embedding_scale)
    if d.input_scale != 1.0:
        x = emit(nodes, "scale", (x,), "embed_scaled", d.hidden, scale=d.input_scale)
    end = None if begin is None else begin(nodes, x)
    used = [i for i in range(len(d.ropes)) if any(d.rope_of(layer) == i for layer in range(d.layers))]
    tables = {i: emit(nodes, "rope_table", (), f"rope{i or ''}", d.ropes[i].rot, rope=d.ropes[i]) for i in used}
    for layer in range(d.layers):
        nodes.append(Node("hidden_out", (x,), attrs={"index": layer}))
        rope = d.rope_of(layer)
        x = decoder_layer(nodes, d, x, None if rope is None else tables[rope], layer, attend, feed_forward)
        x = x if end is None else end(nodes, x, layer)
    normed = norm(nodes, d, x, "final", d.final_norm)
    nodes.append(Node("hidden_out", (normed,), attrs={"index": d.layers}))
    head = "model.embed_tokens.weight" if d.tied else "lm_head.weight"
    limits = {"scale": d.logit_scale} if d.logit_scale != 1.0 else {}
    limits |= {"softcap": d.logit_softcap} if d.logit_softcap else {}
    emit(nodes, "lm_head", (normed,), "logits", d.vocab, head, bias=None, **limits)
    return Graph(d.family, nodes, d.vocab, d.hidden, d.layers + 1, cache, d.max_positions, states)


def decoder_layer(
    nodes: list[Node], d: Trunk, x: Value, table: Value | None, layer: int, attend: Attend, feed_forward: FeedForward
) -> Value:
    """y = x + attention(norm(x)); the output is y + MLP(norm(y)). `d.layer_norms` says which norms there are."""
    name, path, norms = f"l{layer}", f"model.layers.{layer}", d.layer_norms

    def normed(value: Value, which: str, label: str) -> Value:
        return norm(nodes, d, value, f"{name}.{label}", f"{path}.{which}") if which else value

    def added(residual: Value, delta: Value, label: str) -> Value:
        if d.residual_scale != 1.0:
            delta = emit(nodes, "scale", (delta,), f"{delta.name}.scaled", delta.width, scale=d.residual_scale)
        return add(nodes, residual, delta, label)

    before = normed(x, norms.attention_in, "attn_in")
    attended = normed(attend(nodes, before, table, layer), norms.attention_out, "attn_normed")
    if norms.parallel:
        forward = feed_forward(nodes, before, layer)
        return added(added(x, attended, f"{name}.attn_out"), forward, f"{name}.out")
    x = added(x, attended, f"{name}.attn_out")
    forward = feed_forward(nodes, normed(x, norms.mlp_in, "mlp_in"), layer)
    return added(x, normed(forward, norms.mlp_out, "mlp_normed"), f"{name}.out")


def emit(
    nodes: list[Node], op: str, inputs: tuple[Value, ...], name: str, width: int, weight: str = "", /, **attrs: Any
) -> Value:
    """Appends a node with one output and at most one weight, and returns the output."""
    out = Value(name, width)
    nodes.append(Node(op, inputs, (out,), (weight,) if weight else (), attrs))
    return out


def linear(
    nodes: list[Node],
    x: Value,
    name: str,
    width: int,
    path: str,
    bias: bool = False,
    rows: tuple[int, int, int] | None = None,
) -> Value:
    """A product with a matrix, or with `rows` (begin, end, total) of one."""
    attrs: dict[str, Any] = {"biases": (f"{path}.bias" if bias else None,)}
    if rows is not None:
        attrs["rows"] = (rows,)
    return emit(nodes, "linear", (x,), name, width, f"{path}.weight", **attrs)


def norm(nodes: list[Node], d: Trunk, x: Value, name: str, path: str) -> Value:
    """The model's kind of norm over whole rows."""
    if d.norm == "layer":
        out = Value(name, x.width)
        weights = (f"{path}.weight", f"{path}.bias") if d.norm_bias else (f"{path}.weight",)
        nodes.append(Node("layer_norm", (x,), (out,), weights, {"eps": d.eps}))
        return out
    return rms_norm(nodes, x, name, path, d.eps, d.norm == "rms_offset")


def rms_norm(nodes: list[Node], x: Value, name: str, path: str, eps: float, unit_offset: bool = False) -> Value:
    offset = {"unit_offset": True} if unit_offset else {}
    return emit(nodes, "rms_norm", (x,), name, x.width, f"{path}.weight", eps=eps, **offset)


def scale_by_position(nodes: list[Node], d: Trunk, q: Value, name: str, layer: int) -> Value:
    """Queries times the layer's position-dependent factor, if it has one."""
    factor = d.position_scales[layer] if d.position_scales else None
    if factor is None:
        return q
    return emit(
        nodes, "position_scale", (q,), name, q.width, beta=factor.beta, length=factor.length, offset=factor.offset
    )  # fmt: skip


def add(nodes: list[Node], x: Value, delta: Value, name: str) -> Value:
    return emit(nodes, "add", (x, delta), name, x.width)


def mlp(nodes: list[Node], d: Trunk, x: Value, name: str, path: str, width: int) -> Value:
    """W_down (act(W_gate x) * (W_up x)), or W_down act(W_up x) without a gate; `width`: size of the intermediate result."""
    form = d.mlp
    down = f"{path}.{form.down}"
    if not form.gate:
        up = linear(nodes, x, f"{name}.up", width, f"{path}.{form.up}", form.bias)
        hidden = emit(nodes, "gelu", (up,), f"{name}.h", width)
        return linear(nodes, hidden, f"{name}.down", d.hidden, down, form.bias)
    fused = form.gate == form.up
    gate_rows, up_rows = ((0, width, 2 * width), (width, 2 * width, 2 * width)) if fused else (None, None)
    gate = linear(nodes, x, f"{name}.gate", width, f"{path}.{form.gate}", form.bias, gate_rows)
    up = linear(nodes, x, f"{name}.up", width, f"{path}.{form.up}", form.bias, up_rows)
    hidden = emit(nodes, GATED[form.activation], (gate, up), f"{name}.h", width)
    return linear(nodes, hidden, f"{name}.down", d.hidden, down, form.bias)
