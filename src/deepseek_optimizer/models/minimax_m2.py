"""MiniMax-M2: q and k are normalized over all heads; experts are chosen by sigmoid scores with a correction bias."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MAX_WIDTH, read_decoder
from .experts import feed_forward, read_plain_routing
from .fields import Fields


def build(fields: Fields) -> Graph:
    decoder = read_decoder(fields, "minimax_m2", partial=_rotated(fields))
    decoder = replace(decoder, qk_norm="row")
    routing = read_plain_routing(
        fields, decoder.hidden, experts="num_local_experts", width="intermediate_size", scoring="sigmoid",
        bias="e_score_correction_bias",
    )  # fmt: skip
    return decoder_graph(decoder, feed_forward(decoder, routing, (True,) * decoder.layers))


def _rotated(fields: Fields) -> float:
    """The rotated share of a head: published configs have `rotary_dim` instead of `partial_rotary_factor`."""
    if fields.get("rotary_dim") is None:
        return 1.0
    return fields.integer("rotary_dim", MAX_WIDTH) / fields.integer("head_dim", MAX_WIDTH)
