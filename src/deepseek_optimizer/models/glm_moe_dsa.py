"""GLM-5: DeepSeek-V3.2 with tokens chosen by the indexers of some layers, which the layers after each of them share."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError, shown
from ..graph.ir import Graph
from .blocks import trunk_graph
from .experts import feed_forward, listed_layers, read_sigmoid_routing
from .fields import Fields
from .mla import attention, read_latent_decoder


def build(fields: Fields) -> Graph:
    fields.only("mlp_bias", None, False)
    d = read_latent_decoder(fields, "glm_moe_dsa", interleaved=True, sparse=True)
    assert d.indexer is not None
    d = replace(d, indexer=replace(d.indexer, interleaved=True, shared=_shared(fields, d.layers)))
    sparse = listed_layers(fields, d.layers)
    routing = read_sigmoid_routing(fields, d.hidden) if any(sparse) else None
    return trunk_graph(d, d.cache, attention(d), feed_forward(d, routing, sparse))


def _shared(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Whether each layer uses the choice of the layer before it, from `indexer_types`."""
    kinds = fields.get("indexer_types")
    if not isinstance(kinds, (list, tuple)) or len(kinds) < layers or any(kind not in ("full", "shared") for kind in kinds):
        raise ConfigError(f"config.indexer_types: expected 'full' or 'shared' for each of {layers} layers, got {shown(kinds)}")
    if kinds[0] == "shared":
        raise ConfigError("config.indexer_types: the first layer is 'shared', but there is none before it; make it 'full'")
    return tuple(kind == "shared" for kind in kinds[:layers])
