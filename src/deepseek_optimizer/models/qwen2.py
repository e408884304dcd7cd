"""Qwen2: DeepSeek-R1-Distill-Qwen. q, k and v always have biases; some layers may have sliding windows."""

from __future__ import annotations

from ..graph.ir import Graph
from .attention import decoder_graph, decoder_mtp_graph
from .decoder import Decoder, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    return decoder_graph(_read(fields))


def build_mtp(fields: Fields, depth: int, layers: int) -> Graph:
    return decoder_mtp_graph(_read(fields), depth, layers)


def _read(fields: Fields) -> Decoder:
    return read_decoder(fields, "qwen2", qkv_bias=True, sliding=True)
