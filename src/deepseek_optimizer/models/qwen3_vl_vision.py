"""Qwen3-VL, the vision tower (Bai et al. 2025): results of some layers are features for the language model's first ones."""

from __future__ import annotations

from .fields import Fields
from .vision import Tower, TowerLayer, axial_rope, read_tower, tower_graph

LAYER = TowerLayer(
    path="blocks.{}", attention_norm="norm1", mlp_norm="norm2", q="attn.qkv", k="attn.qkv", v="attn.qkv", o="attn.proj",
    up="mlp.linear_fc1", down="mlp.linear_fc2",
)  # fmt: skip


def build(fields: Fields, family: str = "qwen3_vl_vision") -> Tower:
    e = read_tower(fields, family, layers="depth", heads="num_heads", fixed_eps=1e-6)
    ends = fields.layers("deepstack_visual_indexes") if fields.get("deepstack_visual_indexes") else ()
    return Tower(tower_graph(e, LAYER, (axial_rope(fields, e.head_dim),)), (False,) * e.layers, ends)
