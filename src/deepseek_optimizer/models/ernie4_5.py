"""ERNIE 4.5, dense: Llama with interleaved RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MlpForm, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("use_bias")
    decoder = read_decoder(fields, "ernie4_5", qkv_bias=bias, o_bias=bias, mlp=MlpForm(bias=bias))
    return decoder_graph(replace(decoder, rope_interleaved=True))
