"""StableLM: layer norms; a quarter of each head is rotated."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import PARALLEL, LayerNorms, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    fields.only("qk_layernorm", None, False)
    decoder = read_decoder(fields, "stablelm", qkv_bias=fields.flag("use_qkv_bias"), partial=0.25, eps="layer_norm_eps")
    norms = PARALLEL if fields.flag("use_parallel_residual") else LayerNorms()
    return decoder_graph(replace(decoder, norm="layer", norm_bias=True, layer_norms=norms))
