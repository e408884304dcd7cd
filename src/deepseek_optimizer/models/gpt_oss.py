"""gpt-oss: experts with biases and a clamped SwiGLU, a learned logit per head in the softmax, windows in every other layer."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder, read_layer_types, windows_of
from .experts import ClampedForm, feed_forward, read_plain_routing
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "gpt_oss", qkv_bias=bias, o_bias=bias)
    kinds = read_layer_types(fields, decoder.layers, lambda layer: layer % 2 == 0)
    decoder = replace(decoder, windows=windows_of(fields, kinds), head_sinks="sinks")
    # The softmax of the chosen logits equals that of all logits, normalized over the chosen ones.
    routing = read_plain_routing(
        fields, decoder.hidden, experts="num_local_experts", width="intermediate_size", gate="router", gate_bias=True,
        clamped=ClampedForm(alpha=fields.positive("swiglu_alpha"), limit=fields.positive("swiglu_limit")),
    )  # fmt: skip
    return decoder_graph(decoder, feed_forward(decoder, routing, (True,) * decoder.layers))
