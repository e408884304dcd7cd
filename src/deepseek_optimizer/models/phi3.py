"""Phi-3, Phi-3.5, Phi-4: q, k and v are one matrix, as are gate and up; long contexts by LongRoPE."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import FUSED_MLP, read_decoder, same_window
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "phi3", partial=1.0, mlp=FUSED_MLP)
    return decoder_graph(replace(decoder, fused_qkv="qkv_proj", windows=same_window(fields, decoder.layers)))
