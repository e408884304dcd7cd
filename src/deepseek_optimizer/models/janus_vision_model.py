"""Janus's vision tower (Chen et al. 2025), which is SigLIP's with other names."""

from __future__ import annotations

from dataclasses import replace

from . import siglip_vision_model
from .fields import Fields, positive
from .vision import Tower, read_tower, tower_graph


def build(fields: Fields) -> Tower:
    fields.require("use_qk_norm", False)
    inner = int(fields.get("hidden_size") * positive("mlp_ratio", fields.get("mlp_ratio")))
    e = read_tower(fields.with_(intermediate_size=inner), "janus_vision_model")
    layer = replace(siglip_vision_model.LAYER, o="self_attn.projection_layer", qkv_bias=fields.flag("attention_bias"))
    return Tower(tower_graph(e, layer), (False,) * e.layers)
