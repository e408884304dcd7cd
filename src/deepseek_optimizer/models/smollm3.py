"""SmolLM3: Llama in which every fourth layer has no RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError, shown
from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MAX_LAYERS, MlpForm, read_decoder, read_layer_types, windows_of
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "smollm3", qkv_bias=bias, o_bias=bias, mlp=MlpForm(bias=fields.flag("mlp_bias")))
    ropes = _layer_ropes(fields, decoder.layers)
    used = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    kinds = read_layer_types(fields, decoder.layers, lambda layer: ropes[layer] is None)
    windows = windows_of(fields, kinds) if used else (0,) * decoder.layers
    return decoder_graph(replace(decoder, layer_ropes=ropes, windows=windows))


def _layer_ropes(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """From `no_rope_layers`, which has 1 for layers with RoPE; without it, each `no_rope_layer_interval`-th has none."""
    used = fields.get("no_rope_layers")
    if used is None:
        interval = fields.integer("no_rope_layer_interval", MAX_LAYERS, default=4)
        used = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(used, (list, tuple)) or len(used) < layers or any(value not in (0, 1) for value in used):
        raise ConfigError(f"config.no_rope_layers: expected 0 or 1 for each of {layers} layers, got {shown(used)}")
    return tuple(0 if value else None for value in used[:layers])
