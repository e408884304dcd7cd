"""StarCoder2: layer norms, MLPs without a gate, and windows in all layers if the config sets one."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MlpForm, read_decoder, same_window
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("use_bias")
    mlp = MlpForm(activation="gelu", gate="", up="c_fc", down="c_proj", bias=bias)
    decoder = read_decoder(fields, "starcoder2", qkv_bias=bias, o_bias=bias, mlp=mlp, eps="norm_epsilon")
    return decoder_graph(replace(decoder, norm="layer", norm_bias=True, windows=same_window(fields, decoder.layers)))
