"""DeepSeek-OCR-2, the second encoder: layers as in Qwen2 over the features of a picture and queries; the features see each
other, and a query sees them and the queries up to itself (`Patches.sees`).

Source: Transformers' modeling_deepseek_ocr2.py.
"""

from __future__ import annotations

from ..errors import UnsupportedModelError, shown
from .decoder import MAX_POSITIONS
from .fields import Fields
from .rope import read_rope
from .vision import Tower, TowerLayer, read_tower, tower_graph

LAYER = TowerLayer(
    path="layers.{}", attention_norm="input_layernorm", mlp_norm="post_attention_layernorm", q="self_attn.q_proj",
    k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj", gate="mlp.gate_proj", up="mlp.up_proj",
    down="mlp.down_proj", last="norm", rms=True, o_bias=False, mlp_bias=False,
)  # fmt: skip


def build(fields: Fields) -> Tower:
    types = fields.get("layer_types") or ()
    if sliding := [kind for kind in types if kind != "full_attention"]:  # Transformers' mask has no window
        raise UnsupportedModelError(f"config.layer_types {shown(sliding[0])} is not supported. Supported: 'full_attention'.")
    e = read_tower(
        fields, "deepseek_ocr2_encoder", gated=True, kv_heads="num_key_value_heads", head_dim="head_dim", eps="rms_norm_eps"
    )
    rope = read_rope(fields, e.head_dim, fields.integer("max_position_embeddings", MAX_POSITIONS))
    if rope.is_dynamic:  # its frequencies depend on what was encoded before
        raise UnsupportedModelError(f"config.rope_parameters['rope_type'] {rope.kind!r} is not supported in vision towers")
    return Tower(tower_graph(e, LAYER, (rope,)), (False,) * e.layers)
