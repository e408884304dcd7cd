"""ModernBERT (Warner et al. 2024): pre-norm layers, RoPE, local and global attention, gated MLPs."""

from __future__ import annotations

from ..errors import UnsupportedModelError
from ..graph.ir import Graph, Node, Value
from .blocks import add, emit, linear
from .decoder import MAX_POSITIONS, SLIDING, read_layer_types, ropes_by_type
from .encoder import Encoder, attention, encoder_graph, layer_norm, read_encoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    """The unfused graph. The first layer has no norm before its attention, since the embeddings end with one."""
    e = read_encoder(fields, "modernbert", eps="norm_eps", activation="hidden_activation")
    biases = {name: fields.flag(name) for name in ("attention_bias", "mlp_bias", "norm_bias")}
    kinds = read_layer_types(fields, e.layers, lambda layer: layer % 3 > 0)
    window = fields.integer("local_attention", MAX_POSITIONS, low=2) // 2
    ropes, rope_of = ropes_by_type(fields, e.head_dim, kinds, e.max_positions)
    if any(rope.is_dynamic for rope in ropes):
        raise UnsupportedModelError("config.rope_parameters: dynamic RoPE is not supported in this family")
    tables: dict[int, Value] = {}

    def layer(nodes: list[Node], x: Value, index: int) -> Value:
        name, path, kind = f"l{index}", f"layers.{index}", int(kinds[index] == SLIDING)
        if kind not in tables:
            tables[kind] = emit(nodes, "rope_table", (), f"rope{kind}", ropes[kind].rot, rope=ropes[kind])
        y = layer_norm(nodes, e, x, f"{name}.attn_in", f"{path}.attn_norm", biases["norm_bias"]) if index else x
        qkv = tuple(_part(nodes, e, y, name, f"{path}.attn.Wqkv", biases["attention_bias"], i) for i in range(3))
        q, k = (_rope(nodes, e, value, tables[kind], f"{value.name}_rope") for value in qkv[:2])
        attended = attention(nodes, e, (q, k, qkv[2]), f"{name}.attn", window if kind else 0)
        out = linear(nodes, attended, f"{name}.o", e.hidden, f"{path}.attn.Wo", biases["attention_bias"])
        x = add(nodes, x, out, f"{name}.attn_out")
        y = layer_norm(nodes, e, x, f"{name}.mlp_in", f"{path}.mlp_norm", biases["norm_bias"])
        return add(nodes, x, _mlp(nodes, e, y, f"{name}.mlp", f"{path}.mlp", biases["mlp_bias"]), f"{name}.out")

    return encoder_graph(e, layer, lambda nodes, x: layer_norm(nodes, e, x, "final", "final_norm", biases["norm_bias"]))


def _part(nodes: list[Node], e: Encoder, x: Value, name: str, path: str, bias: bool, index: int) -> Value:
    """q, k or v: the rows of one matrix, q's first."""
    rows = (index * e.hidden, (index + 1) * e.hidden, 3 * e.hidden)
    return linear(nodes, x, f"{name}.{'qkv'[index]}", e.hidden, path, bias, rows)


def _rope(nodes: list[Node], e: Encoder, x: Value, table: Value, name: str) -> Value:
    return emit(nodes, "rope", (x, table), name, x.width, heads=e.heads, head_dim=e.head_dim, interleaved=False)


def _mlp(nodes: list[Node], e: Encoder, x: Value, name: str, path: str, bias: bool) -> Value:
    """W_o (act(W_in x) * (W_gate x)), where one matrix has the rows of both."""
    inner, gate = (
        linear(nodes, x, f"{name}.{part}", e.inner, f"{path}.Wi", bias, (i * e.inner, (i + 1) * e.inner, 2 * e.inner))
        for i, part in enumerate(("in", "gate"))
    )
    activated = emit(nodes, e.activation, (inner,), f"{name}.act", e.inner)
    hidden = emit(nodes, "multiply", (activated, gate), f"{name}.h", e.inner)
    return linear(nodes, hidden, f"{name}.out", e.hidden, f"{path}.Wo", bias)
