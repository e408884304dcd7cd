"""Granite 3, MoE: Granite with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder
from .experts import feed_forward, read_plain_routing
from .fields import Fields
from .granite import granite_factors


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = replace(read_decoder(fields, "granitemoe", qkv_bias=bias, o_bias=bias), **granite_factors(fields))
    routing = read_plain_routing(
        fields, decoder.hidden, experts="num_local_experts", width="intermediate_size", module="block_sparse_moe", gate="router"
    )
    return decoder_graph(decoder, feed_forward(decoder, routing, (True,) * decoder.layers))
