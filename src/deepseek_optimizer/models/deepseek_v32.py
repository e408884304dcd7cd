"""DeepSeek-V3.2: V3 with a lightning indexer that selects the visible tokens."""

from __future__ import annotations

from ..graph.ir import Graph
from .blocks import FeedForward, trunk_graph
from .experts import feed_forward, listed_layers, read_sigmoid_routing
from .fields import Fields
from .mla import LatentDecoder, attention, read_latent_decoder
from .mtp import mtp_graph


def build(fields: Fields) -> Graph:
    d, forward = _read(fields, mtp_layers=0)
    return trunk_graph(d, d.cache, attention(d), forward)


def build_mtp(fields: Fields, depth: int, layers: int) -> Graph:
    d, forward = _read(fields, layers)
    return mtp_graph(d, d.cache, attention(d), forward, depth, layers)


def _read(fields: Fields, mtp_layers: int) -> tuple[LatentDecoder, FeedForward]:
    fields.only("rope_interleave", None, True)  # the only form of this family in Transformers
    fields.only("mlp_bias", None, False)
    d = read_latent_decoder(fields, "deepseek_v32", interleaved=True, sparse=True)
    layers = listed_layers(fields, d.layers)
    routing = read_sigmoid_routing(fields, d.hidden) if any(layers) or mtp_layers else None
    return d, feed_forward(d, routing, layers)
