"""Llama: DeepSeek-LLM, DeepSeek-Coder, DeepSeek-R1-Distill-Llama, SmolLM2."""

from __future__ import annotations

from ..graph.ir import Graph
from .attention import decoder_graph, decoder_mtp_graph
from .decoder import Decoder, MlpForm, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    return decoder_graph(_read(fields))


def build_mtp(fields: Fields, depth: int, layers: int) -> Graph:
    return decoder_mtp_graph(_read(fields), depth, layers)


def _read(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias")
    return read_decoder(fields, "llama", qkv_bias=bias, o_bias=bias, mlp=MlpForm(bias=fields.flag("mlp_bias")))
