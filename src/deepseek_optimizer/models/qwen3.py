"""Qwen3: DeepSeek-R1-0528-Qwen3-8B. q and k are normalized per head; head_dim is independent of the hidden size."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph, decoder_mtp_graph
from .decoder import Decoder, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    return decoder_graph(_read(fields))


def build_mtp(fields: Fields, depth: int, layers: int) -> Graph:
    return decoder_mtp_graph(_read(fields), depth, layers)


def _read(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias")
    return replace(read_decoder(fields, "qwen3", qkv_bias=bias, o_bias=bias, sliding=True), qk_norm="head")
