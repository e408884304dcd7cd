"""Gemma 4's vision tower: norms before and after each part of a layer, and of each head; height and width rotate one half of a
head each. Products may have limits for their inputs and results.

Source: Transformers' modeling_gemma4.py.
"""

from __future__ import annotations

from dataclasses import replace

from .decoder import MAX_POSITIONS
from .fields import Fields
from .rope import RopeSpec
from .vision import Tower, TowerLayer, axial_frequencies, read_tower, tower_graph

LAYER = TowerLayer(
    path="layers.{}", attention_norm="input_layernorm", attention_out="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm", q="self_attn.q_proj.linear",
    k="self_attn.k_proj.linear", v="self_attn.v_proj.linear", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", v_norm=True,
    o="self_attn.o_proj.linear", gate="mlp.gate_proj.linear", up="mlp.up_proj.linear", down="mlp.down_proj.linear", rms=True,
    qkv_bias=False, o_bias=False, mlp_bias=False,
)  # fmt: skip


def build(fields: Fields) -> Tower:
    fields.only("attention_bias", None, False)  # Transformers ignores it
    e = read_tower(
        fields, "gemma4_vision", gated=True, kv_heads="num_key_value_heads", head_dim="head_dim", eps="rms_norm_eps",
        activation="hidden_activation",
    )  # fmt: skip
    frequencies = axial_frequencies(fields, e.head_dim, "head_dim", 100.0)
    width, height = (
        RopeSpec(
            "default", e.head_dim // 2, frequencies, context=MAX_POSITIONS, room=MAX_POSITIONS, axes=(axis,) * len(frequencies)
        )
        for axis in (2, 1)
    )
    layer = replace(LAYER, clipped=fields.flag("use_clipped_linears"))
    return Tower(tower_graph(e, layer, (width, height), scale=1.0), (False,) * e.layers)
