"""Mistral: Llama without biases; all layers use the sliding window of the config, or none if it is not set."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder, same_window
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "mistral")
    return decoder_graph(replace(decoder, windows=same_window(fields, decoder.layers)))
