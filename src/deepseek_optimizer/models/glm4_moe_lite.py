"""GLM-4.7-Flash: DeepSeek-V3 with layers of experts by `mlp_layer_types`."""

from __future__ import annotations

from ..graph.ir import Graph
from .blocks import trunk_graph
from .experts import feed_forward, listed_layers, read_sigmoid_routing
from .fields import Fields
from .mla import attention, read_latent_decoder


def build(fields: Fields) -> Graph:
    d = read_latent_decoder(fields, "glm4_moe_lite", interleaved=fields.flag("rope_interleave"))
    sparse = (
        listed_layers(fields, d.layers) if fields.get("mlp_layer_types") is not None else (False, *(True,) * (d.layers - 1))
    )
    routing = read_sigmoid_routing(fields, d.hidden) if any(sparse) else None
    return trunk_graph(d, d.cache, attention(d), feed_forward(d, routing, sparse))
