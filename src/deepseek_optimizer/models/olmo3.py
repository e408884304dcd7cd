"""OLMo 3: OLMo 2 with sliding windows in three of four layers; RoPE is scaled in the others only."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import POST_NORMS, read_decoder, read_layer_types, ropes_by_type, windows_of
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "olmo3", qkv_bias=bias, o_bias=bias, ropes=lambda head_dim, positions: ())
    kinds = read_layer_types(fields, decoder.layers, lambda layer: (layer + 1) % 4 != 0)
    ropes, layer_ropes = ropes_by_type(fields, decoder.head_dim, kinds, decoder.max_positions)
    return decoder_graph(
        replace(
            decoder, ropes=ropes, layer_ropes=layer_ropes, windows=windows_of(fields, kinds), layer_norms=POST_NORMS,
            qk_norm="row",
        )
    )  # fmt: skip
