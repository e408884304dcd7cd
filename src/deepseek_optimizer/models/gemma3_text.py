"""Gemma 3, text: Gemma 2 with q/k norms instead of limits; five of six layers have windows, and a RoPE of their own."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MAX_LAYERS, read_layer_types, ropes_by_type, windows_of
from .fields import Fields
from .gemma import SANDWICH_NORMS, read_gemma, softcap


def build(fields: Fields) -> Graph:
    decoder = read_gemma(fields, "gemma3_text", ropes=lambda head_dim, positions: ())
    pattern = fields.integer("sliding_window_pattern", MAX_LAYERS, default=6)
    kinds = read_layer_types(fields, decoder.layers, lambda layer: (layer + 1) % pattern != 0)
    ropes, layer_ropes = ropes_by_type(fields, decoder.head_dim, kinds, decoder.max_positions, "rope_local_base_freq")
    return decoder_graph(
        replace(
            decoder, ropes=ropes, layer_ropes=layer_ropes, layer_norms=SANDWICH_NORMS, windows=windows_of(fields, kinds),
            qk_norm="head", scale=fields.positive("query_pre_attn_scalar") ** -0.5,
            logit_softcap=softcap(fields, "final_logit_softcapping"),
        )
    )  # fmt: skip
