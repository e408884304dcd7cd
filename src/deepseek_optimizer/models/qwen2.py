"""Qwen2: DeepSeek-R1-Distill-Qwen. q, k and v always have biases; some layers may have sliding windows."""

from __future__ import annotations

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    return decoder_graph(read_decoder(fields, "qwen2", qkv_bias=True, sliding=True))
