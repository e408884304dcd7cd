"""SigLIP's vision tower (Zhai et al. 2023), in Gemma 3 and DeepSeek-VL."""

from __future__ import annotations

from .fields import Fields
from .vision import Tower, TowerLayer, read_tower, tower_graph

LAYER = TowerLayer(
    path="layers.{}", attention_norm="layer_norm1", mlp_norm="layer_norm2", q="self_attn.q_proj", k="self_attn.k_proj",
    v="self_attn.v_proj", o="self_attn.out_proj", up="mlp.fc1", down="mlp.fc2",
)  # fmt: skip


def build(fields: Fields, family: str = "siglip_vision_model") -> Tower:
    e = read_tower(fields, family)
    return Tower(tower_graph(e, LAYER), (False,) * e.layers)
