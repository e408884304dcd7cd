"""GLM-4.5, GLM-4.6: half of each head is rotated; experts chosen as in DeepSeek-V3."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder
from .experts import feed_forward, first_dense, read_sigmoid_routing
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "glm4_moe", qkv_bias=fields.flag("attention_bias"), partial=0.5)
    decoder = replace(decoder, qk_norm="head" if fields.flag("use_qk_norm") else "")
    sparse = first_dense(fields, decoder.layers)
    routing = read_sigmoid_routing(fields, decoder.hidden) if any(sparse) else None
    return decoder_graph(decoder, feed_forward(decoder, routing, sparse))
