"""Qwen3: DeepSeek-R1-0528-Qwen3-8B. q and k are normalized per head; head_dim is independent of the hidden size."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    return decoder_graph(replace(read_decoder(fields, "qwen3", qkv_bias=bias, o_bias=bias, sliding=True), qk_norm="head"))
