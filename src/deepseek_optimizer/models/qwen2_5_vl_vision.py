"""Qwen2.5-VL, the vision tower (Bai et al. 2025): most layers attend within windows."""

from __future__ import annotations

from .fields import Fields
from .vision import Tower, TowerLayer, axial_rope, read_tower, tower_graph

LAYER = TowerLayer(
    path="blocks.{}", attention_norm="norm1", mlp_norm="norm2", q="attn.qkv", k="attn.qkv", v="attn.qkv", o="attn.proj",
    gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", rms=True,
)  # fmt: skip


def build(fields: Fields) -> Tower:
    e = read_tower(fields, "qwen2_5_vl_vision", gated=True, layers="depth", heads="num_heads", fixed_eps=1e-6)
    whole = fields.layers("fullatt_block_indexes")
    windowed = tuple(layer not in whole for layer in range(e.layers))
    return Tower(tower_graph(e, LAYER, (axial_rope(fields, e.head_dim),)), windowed)
