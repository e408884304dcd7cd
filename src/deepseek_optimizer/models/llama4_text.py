"""Llama 4, its language model: chunked attention with RoPE and full attention without; experts with weighted inputs."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import FULL, MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH, read_decoder, read_layer_kinds, read_nope_layers
from .experts import feed_forward, read_plain_routing
from .fields import Fields
from .rope import PositionScale

CHUNKED = "chunked_attention"


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    d = read_decoder(fields, "llama4_text", qkv_bias=bias, o_bias=bias, width="intermediate_size_mlp")
    kinds = read_layer_kinds(fields, d.layers, FULL, CHUNKED)
    chunk = fields.integer("attention_chunk_size", MAX_POSITIONS) if CHUNKED in kinds else 0
    ropes = read_nope_layers(fields, d.layers)
    scale = None
    if fields.flag("attn_temperature_tuning"):
        scale = PositionScale(fields.positive("attn_scale"), fields.integer("floor_scale", MAX_POSITIONS), offset=1)
    d = replace(
        d, layer_ropes=ropes, rope_interleaved=True, windows=tuple(chunk if kind == CHUNKED else 0 for kind in kinds),
        chunked=True, position_scales=tuple(scale if rope is None else None for rope in ropes),
        qk_norm="head" if fields.flag("use_qk_norm") else "", qk_norm_after_rope=True, qk_norm_names=("", ""),
    )  # fmt: skip
    sparse = _sparse_layers(fields, d.layers)
    routing = read_plain_routing(
        fields, d.hidden, experts="num_local_experts", width="intermediate_size", scoring="sigmoid", normalize=False,
        shared=fields.integer("intermediate_size", MAX_WIDTH), module="feed_forward", gate="router",
        shared_module="shared_expert", weigh_input=True, layout="columns",
    ) if any(sparse) else None  # fmt: skip
    return decoder_graph(d, feed_forward(d, routing, sparse, dense="feed_forward"))


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: those in `moe_layers`; without it every `interleave_moe_layer_step`-th."""
    if fields.get("moe_layers") is None:
        step = fields.integer("interleave_moe_layer_step", MAX_LAYERS)
        return tuple(layer % step == step - 1 for layer in range(layers))
    listed = fields.layers("moe_layers")
    return tuple(layer in listed for layer in range(layers))
