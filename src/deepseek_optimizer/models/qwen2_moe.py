"""Qwen2-MoE, Qwen1.5-MoE: Qwen2 with experts, of which one is shared and weighted."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MAX_LAYERS, MAX_WIDTH, read_decoder, read_layer_types, windows_of
from .experts import feed_forward, read_plain_routing, sparse_by_step
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "qwen2_moe", qkv_bias=fields.get("qkv_bias", True) is not False)
    kinds = read_layer_types(fields, decoder.layers, lambda layer: _slides(fields, layer))
    decoder = replace(decoder, windows=windows_of(fields, kinds))
    routing = read_plain_routing(
        fields, decoder.hidden, width="moe_intermediate_size", normalize=fields.flag("norm_topk_prob"),
        shared=fields.integer("shared_expert_intermediate_size", MAX_WIDTH), shared_module="shared_expert",
        shared_gate="shared_expert_gate",
    )  # fmt: skip
    return decoder_graph(decoder, feed_forward(decoder, routing, sparse_by_step(fields, decoder.layers)))


def _slides(fields: Fields, layer: int) -> bool:
    """Without `layer_types`, every other layer below `max_window_layers` has a window, if windows are used."""
    return fields.flag("use_sliding_window") and layer < fields.integer("max_window_layers", MAX_LAYERS) and layer % 2 == 0
