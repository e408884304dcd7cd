"""GLM-4 (first series): half of each head is rotated, in interleaved pairs; gate and up are one matrix."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import FUSED_MLP, Decoder, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    return decoder_graph(read_glm(fields, "glm"))


def read_glm(fields: Fields, family: str) -> Decoder:
    """Reads what both series share."""
    bias = fields.flag("attention_bias")
    return replace(read_decoder(fields, family, qkv_bias=bias, partial=0.5, mlp=FUSED_MLP), rope_interleaved=True)
