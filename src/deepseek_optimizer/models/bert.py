"""BERT (Devlin et al. 2019): post-norm layers, learned positions."""

from __future__ import annotations

from ..graph.ir import Graph
from .encoder import PostNormLayer, post_norm_graph, read_encoder, refuse_decoders
from .fields import Fields

LAYER = PostNormLayer(
    path="encoder.layer.{}",
    q="attention.self.query", k="attention.self.key", v="attention.self.value", o="attention.output.dense",
    attention_norm="attention.output.LayerNorm", up="intermediate.dense", down="output.dense", mlp_norm="output.LayerNorm",
)  # fmt: skip


def build(fields: Fields, family: str = "bert") -> Graph:
    """The unfused graph."""
    refuse_decoders(fields)
    return post_norm_graph(read_encoder(fields, family), LAYER)
