"""LFM2: layers of attention, and layers with a gated short convolution: y = W_out (c * conv(b * x)) with (b, c, x) = W_in h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..graph.ir import CacheSpec, Graph, Node, StateSpec, Value
from .attention import attention
from .blocks import FeedForward, emit, linear, mlp, trunk_graph
from .decoder import MAX_KERNEL, MAX_WIDTH, Decoder, LayerNorms, MlpForm, read_decoder, read_layer_kinds
from .fields import Fields


def build(fields: Fields) -> Graph:
    def dense(d: Decoder) -> FeedForward:
        return dense_mlp(replace(d, intermediate=_mlp_width(fields, d.intermediate)))

    return short_conv_graph(fields, "lfm2", dense)


def short_conv_graph(fields: Fields, family: str, feed_forward: Callable[[Decoder], FeedForward]) -> Graph:
    """The unfused graph of a decoder with attention and short convolutions.

    Args:
        fields: the config.
        family: the `model_type`.
        feed_forward: creates the builder of the layers' feed-forward networks.
    """
    mlp_form = MlpForm(gate="w1", up="w3", down="w2")
    d = read_decoder(fields, family, mlp=mlp_form, eps="norm_eps", activation=None)
    kinds = read_layer_kinds(fields, d.layers, "full_attention", "conv")
    d = replace(
        d, final_norm="model.embedding_norm", qk_norm="head", o_name="out_proj", qk_norm_names=("q_layernorm", "k_layernorm"),
        layer_norms=LayerNorms(attention_in="operator_norm", mlp_in="ffn_norm"),
        cache_layers=tuple(kinds[:layer].count("full_attention") for layer in range(d.layers)),
    )  # fmt: skip
    kernel, bias, attend = fields.integer("conv_L_cache", MAX_KERNEL, low=2), fields.flag("conv_bias"), attention(d)

    def mix(nodes: list[Node], x: Value, table: Value | None, layer: int) -> Value:
        if kinds[layer] == "full_attention":
            return attend(nodes, x, table, layer)
        return _convolution(nodes, d, x, layer, kinds[:layer].count("conv"), kernel, bias)

    cache = CacheSpec(kinds.count("full_attention"), d.kv_heads, d.head_dim)
    states = (StateSpec((kernel - 1, d.hidden)),) * kinds.count("conv")
    return trunk_graph(d, cache, mix, feed_forward(d), states)


def dense_mlp(d: Decoder) -> FeedForward:
    """Feed-forward networks without experts."""

    def forward(nodes: list[Node], x: Value, layer: int) -> Value:
        return mlp(nodes, d, x, f"l{layer}.mlp", f"model.layers.{layer}.feed_forward", d.intermediate)

    return forward


def _mlp_width(fields: Fields, width: int) -> int:
    if not fields.flag("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if fields.get("block_ffn_dim_multiplier") is None:
        return width
    step = fields.integer("block_multiple_of", MAX_WIDTH)
    return -(-int(fields.positive("block_ffn_dim_multiplier") * width) // step) * step


def _convolution(nodes: list[Node], d: Decoder, x: Value, layer: int, state: int, kernel: int, bias: bool) -> Value:
    name, path, n = f"l{layer}.conv", f"model.layers.{layer}.conv", d.hidden
    b, c, value = (
        linear(nodes, x, f"{name}.{part}", n, f"{path}.in_proj", bias, (i * n, (i + 1) * n, 3 * n))
        for i, part in enumerate("bcx")
    )
    gated = emit(nodes, "multiply", (b, value), f"{name}.bx", n)
    mixed = emit(
        nodes, "short_conv", (gated,), f"{name}.mixed", n, f"{path}.conv.weight", state=state, kernel=kernel,
        activation="none", bias=f"{path}.conv.bias" if bias else None,
    )  # fmt: skip
    out = emit(nodes, "multiply", (c, mixed), f"{name}.y", n)
    return linear(nodes, out, f"{name}.out", n, f"{path}.out_proj", bias)
