"""Mistral 4: latent attention whose queries grow with the logarithm of the position; softmax router with groups."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .blocks import trunk_graph
from .experts import feed_forward, first_dense, read_grouped_softmax_routing
from .fields import Fields
from .mla import attention, read_latent_decoder
from .rope import read_position_scale


def build(fields: Fields) -> Graph:
    d = read_latent_decoder(fields, "mistral4", interleaved=fields.flag("rope_interleave"), partial=True)
    d = replace(d, position_scales=(read_position_scale(fields, d.max_positions),) * d.layers)
    sparse = first_dense(fields, d.layers)
    routing = read_grouped_softmax_routing(fields, d.hidden) if any(sparse) else None
    return trunk_graph(d, d.cache, attention(d), feed_forward(d, routing, sparse))
