"""Command R7B and Command A: attention and MLP read the same layer norm; only sliding layers have RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MAX_LAYERS, PARALLEL, SLIDING, read_decoder, read_layer_types, windows_of
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "cohere2", qkv_bias=bias, o_bias=bias, eps="layer_norm_eps")
    pattern = fields.integer("sliding_window_pattern", MAX_LAYERS, default=4)
    kinds = read_layer_types(fields, decoder.layers, lambda layer: (layer + 1) % pattern != 0)
    return decoder_graph(
        replace(
            decoder, norm="layer", layer_norms=PARALLEL, layer_ropes=tuple(0 if kind == SLIDING else None for kind in kinds),
            rope_interleaved=True, windows=windows_of(fields, kinds), logit_scale=fields.positive("logit_scale"),
        )
    )  # fmt: skip
