"""Qwen3-VL, the language model: Qwen3 with multimodal RoPE, and features of pictures added to its first layers' results."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph, Node, Value
from .attention import decoder_graph
from .blocks import Begin, LayerEnd, emit
from .decoder import MAX_LAYERS, read_decoder
from .fields import Fields
from .mrope import with_axes

DEFAULT_SECTION = (24, 20, 20)


def build(fields: Fields) -> Graph:
    """The field `deepstack_layers` is not Transformers': it is the number of layers of the vision tower whose features are
    added, of the whole model's config (`integration/multimodal`)."""
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "qwen3_vl_text", qkv_bias=bias, o_bias=bias)
    rope = with_axes(fields, decoder.rope, DEFAULT_SECTION, interleaved=True)
    count = fields.integer("deepstack_layers", MAX_LAYERS, low=0, default=0)
    return decoder_graph(replace(decoder, qk_norm="head", ropes=(rope,)), begin=_features(count) if count else None)


def _features(count: int) -> Begin:
    def begin(nodes: list[Node], x: Value) -> LayerEnd:
        def end(nodes: list[Node], x: Value, layer: int) -> Value:
            return emit(nodes, "add_features", (x,), f"l{layer}.seen", x.width, index=layer) if layer < count else x

        return end

    return begin
