"""Mistral: Llama without biases; all layers use the sliding window of the config, or none if it is not set."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .blocks import decoder_graph
from .decoder import MAX_POSITIONS, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "mistral")
    if fields.get("sliding_window") is not None:
        window = fields.integer("sliding_window", MAX_POSITIONS)
        decoder = replace(decoder, windows=(window,) * decoder.layers)
    return decoder_graph(decoder)
