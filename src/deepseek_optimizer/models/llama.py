"""Llama: DeepSeek-LLM, DeepSeek-Coder, DeepSeek-R1-Distill-Llama, SmolLM2."""

from __future__ import annotations

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MlpForm, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    return decoder_graph(read_decoder(fields, "llama", qkv_bias=bias, o_bias=bias, mlp=MlpForm(bias=fields.flag("mlp_bias"))))
