"""OLMo 2: norms follow attention and MLP, and q and k are normalized over all heads. Source: OLMo Team 2025."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import POST_NORMS, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "olmo2", qkv_bias=bias, o_bias=bias)
    return decoder_graph(replace(decoder, layer_norms=POST_NORMS, qk_norm="row"))
