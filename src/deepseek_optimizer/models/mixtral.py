"""Mixtral: Mistral with experts in every layer. Source: Jiang et al. 2024."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder, same_window
from .experts import feed_forward, read_plain_routing
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "mixtral")
    decoder = replace(decoder, windows=same_window(fields, decoder.layers))
    routing = read_plain_routing(fields, decoder.hidden, experts="num_local_experts", width="intermediate_size")
    return decoder_graph(decoder, feed_forward(decoder, routing, (True,) * decoder.layers))
