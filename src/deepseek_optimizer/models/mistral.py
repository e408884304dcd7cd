"""Mistral: Llama without biases; all layers use the sliding window of the config, or none if it is not set."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph, decoder_mtp_graph
from .decoder import Decoder, read_decoder, same_window
from .fields import Fields


def build(fields: Fields) -> Graph:
    return decoder_graph(_read(fields))


def build_mtp(fields: Fields, depth: int, layers: int) -> Graph:
    return decoder_mtp_graph(_read(fields), depth, layers)


def _read(fields: Fields) -> Decoder:
    decoder = read_decoder(fields, "mistral")
    return replace(decoder, windows=same_window(fields, decoder.layers))
