"""EXAONE 4: norms follow attention and MLP; q and k are normalized per head; full layers beside sliding ones have no RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MAX_LAYERS, POST_NORMS, SLIDING, read_decoder, read_layer_types, windows_of
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "exaone4")
    window = fields.get("sliding_window")
    pattern = 0 if window is None else fields.integer("sliding_window_pattern", MAX_LAYERS, default=4)
    kinds = read_layer_types(fields, decoder.layers, lambda layer: pattern > 0 and (layer + 1) % pattern != 0)
    ropes = tuple(0 if window is None or kind == SLIDING else None for kind in kinds)
    return decoder_graph(
        replace(decoder, layer_ropes=ropes, windows=windows_of(fields, kinds), layer_norms=POST_NORMS, qk_norm="head")
    )
