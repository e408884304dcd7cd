"""LFM2: layers of attention, and layers with a gated short convolution: y = W_out (c * conv(b * x)) with (b, c, x) = W_in h."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import CacheSpec, Graph, Node, StateSpec, Value
from .blocks import AttentionLayer, Norms, attention, emit, linear, mlp, trunk_graph
from .decoder import MAX_WIDTH, Decoder, read_decoder, read_layer_kinds
from .fields import Fields

MAX_KERNEL = 64


def build(fields: Fields) -> Graph:
    d = read_decoder(fields, "lfm2", qk_norm=True, eps="norm_eps", activation=None)
    d = replace(d, intermediate=_mlp_width(fields, d.intermediate))
    kinds = read_layer_kinds(fields, d.layers, "full_attention", "conv")
    kernel, bias = fields.integer("conv_L_cache", MAX_KERNEL, low=2), fields.flag("conv_bias")

    def mix(nodes: list[Node], x: Value, table: Value, layer: int) -> Value:
        path, index = f"model.layers.{layer}", kinds[:layer].count(kinds[layer])
        if kinds[layer] == "conv":
            return _convolution(nodes, d, x, f"l{layer}.conv", f"{path}.conv", index, kernel, bias)
        form = AttentionLayer(f"{path}.self_attn", index, o_proj="out_proj", qk_norms=("q_layernorm", "k_layernorm"))
        return attention(nodes, d, x, table, layer, form)

    def feed_forward(nodes: list[Node], x: Value, layer: int) -> Value:
        path = f"model.layers.{layer}.feed_forward"
        return mlp(nodes, d, x, f"l{layer}.mlp", path, d.intermediate, ("w1", "w3", "w2"))

    cache = CacheSpec(kinds.count("full_attention"), d.kv_heads, d.head_dim)
    states = (StateSpec((kernel - 1, d.hidden)),) * kinds.count("conv")
    return trunk_graph(d, cache, mix, feed_forward, Norms("operator_norm", "ffn_norm", "model.embedding_norm"), states)


def _mlp_width(fields: Fields, width: int) -> int:
    if not fields.flag("block_auto_adjust_ff_dim"):
        return width
    width, multiplier = int(2 * width / 3), fields.get("block_ffn_dim_multiplier")
    if multiplier is None:
        return width
    step = fields.integer("block_multiple_of", MAX_WIDTH)
    return -(-int(fields.positive("block_ffn_dim_multiplier") * width) // step) * step


def _convolution(nodes: list[Node], d: Decoder, x: Value, name: str, path: str, state: int, kernel: int, bias: bool) -> Value:
    three = linear(nodes, x, f"{name}.in", 3 * d.hidden, f"{path}.in_proj", bias)
    b, c, value = (
        emit(nodes, "columns", (three,), f"{name}.{part}", d.hidden, groups=1, begin=i * d.hidden, end=(i + 1) * d.hidden)
        for i, part in enumerate("bcx")
    )
    gated = emit(nodes, "multiply", (b, value), f"{name}.bx", d.hidden)
    mixed = emit(
        nodes, "short_conv", (gated,), f"{name}.mixed", d.hidden, f"{path}.conv.weight", state=state, kernel=kernel,
        activation="none", bias=f"{path}.conv.bias" if bias else None,
    )  # fmt: skip
    out = emit(nodes, "multiply", (c, mixed), f"{name}.y", d.hidden)
    return linear(nodes, out, f"{name}.out", d.hidden, f"{path}.out_proj", bias)
