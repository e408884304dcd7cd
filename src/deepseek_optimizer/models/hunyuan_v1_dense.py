"""HunYuan, dense: q and k are normalized per head, after RoPE."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_decoder
from .fields import Fields
from .rope import read_rope


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(
        fields, "hunyuan_v1_dense", qkv_bias=bias, o_bias=bias,
        ropes=lambda head_dim, positions: (read_rope(fields, head_dim, positions, alpha=True),),
    )  # fmt: skip
    names = ("query_layernorm", "key_layernorm")
    return decoder_graph(replace(decoder, qk_norm="head", qk_norm_after_rope=True, qk_norm_names=names))
