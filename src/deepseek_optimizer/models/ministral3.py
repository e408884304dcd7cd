"""Ministral 3: Mistral whose queries grow with the logarithm of the position."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder, same_window
from .fields import Fields
from .rope import read_position_scale


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "ministral3")
    scale = read_position_scale(fields, decoder.max_positions)
    return decoder_graph(
        replace(decoder, windows=same_window(fields, decoder.layers), position_scales=(scale,) * decoder.layers)
    )
