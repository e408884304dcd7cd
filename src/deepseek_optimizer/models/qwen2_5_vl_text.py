"""Qwen2.5-VL, the language model: Qwen2 with multimodal RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder
from .fields import Fields
from .mrope import with_axes

DEFAULT_SECTION = (16, 24, 24)


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "qwen2_5_vl_text", qkv_bias=True, sliding=True)
    return decoder_graph(replace(decoder, ropes=(with_axes(fields, decoder.rope, DEFAULT_SECTION, interleaved=False),)))
