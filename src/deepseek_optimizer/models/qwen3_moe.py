"""Qwen3-MoE: Qwen3 with experts, none of them shared."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder, same_window
from .experts import feed_forward, read_plain_routing, sparse_by_step
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "qwen3_moe", qkv_bias=bias, o_bias=bias)
    used = fields.flag("use_sliding_window")
    decoder = replace(decoder, qk_norm="head", windows=same_window(fields, decoder.layers) if used else decoder.windows)
    normalize = fields.flag("norm_topk_prob")
    routing = read_plain_routing(fields, decoder.hidden, width="moe_intermediate_size", normalize=normalize)
    return decoder_graph(decoder, feed_forward(decoder, routing, sparse_by_step(fields, decoder.layers)))
