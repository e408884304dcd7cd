"""LFM2 with experts: LFM2-8B-A1B. All layers but the first few have experts, chosen by sigmoid scores with a bias."""

from __future__ import annotations

from ..graph.ir import Graph, Node, Value
from .blocks import FeedForward
from .decoder import MAX_LAYERS, Decoder
from .experts import feed_forward, read_plain_routing
from .fields import Fields
from .lfm2 import dense_mlp, short_conv_graph


def build(fields: Fields) -> Graph:
    def networks(d: Decoder) -> FeedForward:
        count, dense = fields.integer("num_dense_layers", MAX_LAYERS, low=0), dense_mlp(d)
        routing = read_plain_routing(
            fields, d.hidden, width="moe_intermediate_size", scoring="sigmoid", normalize=fields.flag("norm_topk_prob"),
            scale=fields.positive("routed_scaling_factor"), bias="expert_bias" if fields.flag("use_expert_bias") else "",
            module="feed_forward",
        )  # fmt: skip
        experts = feed_forward(d, routing, (True,) * d.layers)

        def forward(nodes: list[Node], x: Value, layer: int) -> Value:
            return (dense if layer < count else experts)(nodes, x, layer)

        return forward

    return short_conv_graph(fields, "lfm2_moe", networks)
