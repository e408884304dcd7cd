"""Llama: DeepSeek-LLM, DeepSeek-Coder, DeepSeek-R1-Distill-Llama, SmolLM2."""

from __future__ import annotations

from ..graph.ir import Graph
from .blocks import decoder_graph
from .decoder import read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    return decoder_graph(read_decoder(fields, "llama", qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias")))
