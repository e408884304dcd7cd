"""Ministral: Mistral whose layers have windows by `layer_types`."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder, read_layer_types, windows_of
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "ministral")
    windowed = fields.get("sliding_window") is not None
    kinds = read_layer_types(fields, decoder.layers, lambda layer: windowed)
    return decoder_graph(replace(decoder, windows=windows_of(fields, kinds)))
