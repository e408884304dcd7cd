"""GLM-4-0414: GLM-4 with norms before and after attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import LayerNorms
from .fields import Fields
from .glm import read_glm

NORMS = LayerNorms(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")


def build(fields: Fields) -> Graph:
    return decoder_graph(replace(read_glm(fields, "glm4"), layer_norms=NORMS))
