"""SmolLM3: Llama in which every fourth layer has no RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MlpForm, read_decoder, read_layer_types, read_nope_layers, windows_of
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "smollm3", qkv_bias=bias, o_bias=bias, mlp=MlpForm(bias=fields.flag("mlp_bias")))
    ropes = read_nope_layers(fields, decoder.layers)
    used = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    kinds = read_layer_types(fields, decoder.layers, lambda layer: ropes[layer] is None)
    windows = windows_of(fields, kinds) if used else (0,) * decoder.layers
    return decoder_graph(replace(decoder, layer_ropes=ropes, windows=windows))
