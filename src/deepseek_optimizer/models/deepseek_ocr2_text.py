"""DeepSeek-OCR 2, the language model: DeepSeek-V2's experts with attention over keys and values of all heads."""

from __future__ import annotations

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MlpForm, read_decoder
from .experts import feed_forward, listed_layers, read_softmax_routing
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    mlp = MlpForm(bias=fields.flag("mlp_bias"))
    decoder = read_decoder(fields, "deepseek_ocr2_text", qkv_bias=bias, o_bias=bias, mlp=mlp)
    sparse = listed_layers(fields, decoder.layers)
    routing = read_softmax_routing(fields, decoder.hidden) if any(sparse) else None
    return decoder_graph(decoder, feed_forward(decoder, routing, sparse))
