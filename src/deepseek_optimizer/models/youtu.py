"""Youtu-LLM: latent attention, dense MLPs."""

from __future__ import annotations

from ..graph.ir import Graph
from .blocks import trunk_graph
from .experts import feed_forward
from .fields import Fields
from .mla import attention, read_latent_decoder


def build(fields: Fields) -> Graph:
    fields.only("mlp_bias", None, False)
    d = read_latent_decoder(fields, "youtu", interleaved=fields.flag("rope_interleave"))
    return trunk_graph(d, d.cache, attention(d), feed_forward(d, None, ()))
