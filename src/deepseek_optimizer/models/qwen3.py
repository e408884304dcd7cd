"""Qwen3: DeepSeek-R1-0528-Qwen3-8B. q and k are normalised per head; head_dim is independent of the hidden size."""

from __future__ import annotations

from ..graph.ir import Graph
from .blocks import decoder_graph
from .decoder import read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    return decoder_graph(read_decoder(fields, "qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, sliding=True))
