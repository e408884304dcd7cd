"""DistilBERT (Sanh et al. 2019): BERT with fewer layers, without token types and pooler."""

from __future__ import annotations

from ..graph.ir import Graph
from .encoder import PostNormLayer, post_norm_graph, read_encoder
from .fields import Fields

LAYER = PostNormLayer(
    path="transformer.layer.{}",
    q="attention.q_lin", k="attention.k_lin", v="attention.v_lin", o="attention.out_lin", attention_norm="sa_layer_norm",
    up="ffn.lin1", down="ffn.lin2", mlp_norm="output_layer_norm",
)  # fmt: skip


def build(fields: Fields) -> Graph:
    """The unfused graph."""
    encoder = read_encoder(
        fields, "distilbert", layers="n_layers", hidden="dim", inner="hidden_dim", heads="n_heads", activation="activation",
        fixed_eps=1e-12,
    )  # fmt: skip
    return post_norm_graph(encoder, LAYER)
