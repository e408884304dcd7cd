"""Seed-OSS: Llama with biases of its own choice."""

from __future__ import annotations

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MlpForm, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    biases = {"qkv_bias": fields.flag("attention_bias"), "o_bias": fields.flag("attention_out_bias")}
    return decoder_graph(read_decoder(fields, "seed_oss", **biases, mlp=MlpForm(bias=fields.flag("mlp_bias"))))
