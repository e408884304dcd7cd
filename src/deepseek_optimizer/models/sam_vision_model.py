"""SAM's vision tower (Segment Anything; Kirillov et al. 2023), in DeepSeek-VL for large pictures: ViT layers with relative
positions, most of which attend within windows. Windows at the right and the bottom are filled up with padding, which counts.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import UnsupportedModelError
from ..graph.ir import Graph
from .fields import Fields
from .vision import RelativePositions, Tower, TowerLayer, read_tower, tower_graph

LAYER = TowerLayer(
    path="layers.{}", attention_norm="layer_norm1", mlp_norm="layer_norm2", q="attn.qkv", k="attn.qkv", v="attn.qkv",
    o="attn.proj", up="mlp.lin1", down="mlp.lin2",
)  # fmt: skip
_MOST_PATCHES = 1 << 12  # in height or width


def build(fields: Fields) -> Tower:
    """The tower; DeepSeek-VL needs the result of its first layer without windows besides the last one's."""
    tower = build_sam(fields, "sam_vision_model")
    whole = [layer for layer, windowed in enumerate(tower.windowed) if not windowed]
    return replace(tower, ends=tuple(whole[:1]))


def build_sam(fields: Fields, family: str) -> Tower:
    """A tower with SAM's layers.

    Args:
        fields: the config.
        family: its `model_type`.
    """
    fields.only("use_rel_pos", True)
    e = read_tower(fields, family, inner="mlp_dim")
    window = fields.integer("window_size", _MOST_PATCHES, low=0)
    whole = fields.layers("global_attn_indexes")
    if not isinstance(fields.get("image_size"), int) or not isinstance(fields.get("patch_size"), int):
        raise UnsupportedModelError("config.image_size and config.patch_size: only squares are supported")
    side = fields.integer("image_size", 1 << 16) // fields.integer("patch_size", 1 << 16)
    windowed = tuple(window > 0 and layer not in whole for layer in range(e.layers))
    names = replace(LAYER, qkv_bias=fields.flag("qkv_bias"))

    def on_grid(rows: int, cols: int) -> Graph:
        grids = tuple((window, window) if inside else (rows, cols) for inside in windowed)
        return tower_graph(e, names, relative=RelativePositions("attn.rel_pos_h", "attn.rel_pos_w", grids, windowed))

    return Tower(on_grid(side, side), windowed, on_grid=on_grid)
