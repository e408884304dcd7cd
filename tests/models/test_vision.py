"""Configs of vision towers: what their graphs contain, and what is refused."""

from __future__ import annotations

import pytest

from deepseek_optimizer import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import TOWERS, build_tower
from support.multimodal import FAMILIES

OF_TOWER = {
    "qwen2_5_vl_vision": "qwen2_5_vl", "qwen3_vl_vision": "qwen3_vl", "qwen3_5_vision": "qwen3_5",
    "siglip_vision_model": "gemma3", "smolvlm_vision": "smolvlm", "janus_vision_model": "janus", "gemma4_vision": "gemma4",
    "deepseek_ocr2_encoder": "deepseek_ocr2", "deepseek_ocr2_sam_vision_model": "deepseek_ocr2",
    "sam_vision_model": "deepseek_vl_hybrid",
}  # fmt: skip
# The config within the model's, where it is not vision_config itself.
_PART = {
    "deepseek_ocr2_encoder": ("vision_config", "encoder_config"), "sam_vision_model": ("high_res_vision_config",),
    "deepseek_ocr2_sam_vision_model": ("vision_config", "sam_config"),
}  # fmt: skip
ROPES = {"qwen2_5_vl_vision": 1, "qwen3_vl_vision": 1, "qwen3_5_vision": 1, "gemma4_vision": 2, "deepseek_ocr2_encoder": 1}


def config_of(tower, **fields):
    import transformers

    family = FAMILIES[OF_TOWER[tower]]
    config = getattr(transformers, family.config_class)(**family.config)
    for name in _PART.get(tower, ("vision_config",)):
        config = getattr(config, name)
    return {**config.to_dict(), **fields}


@pytest.mark.parametrize("name", TOWERS)
def test_graphs(name):
    config = config_of(name)
    tower = build_tower(config)
    check_graph(tower.graph)
    assert config["model_type"] == tower.graph.family == name
    assert sum(node.op == "encoder_attention" for node in tower.graph.nodes) == len(tower.windowed)
    assert sum(node.op == "rope_table" for node in tower.graph.nodes) == ROPES.get(name, 0)


def test_stretches():
    """Layers with windows run together, and each of the others by itself."""
    config = config_of("qwen2_5_vl_vision", depth=9, fullatt_block_indexes=[0, 3, 4, 8])
    assert build_tower(config).stretches() == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 8), (8, 9)]
    assert build_tower(config_of("qwen3_vl_vision")).stretches() == [(0, 1), (1, 2), (2, 3)]
    assert build_tower(config_of("qwen3_vl_vision")).ends == (0, 2)


def test_positions_are_height_and_width():
    tower = build_tower(config_of("qwen2_5_vl_vision", hidden_size=64))
    (rope,) = (node.attrs["rope"] for node in tower.graph.nodes if node.op == "rope_table")
    assert rope.axes == (1,) * 8 + (2,) * 8 and rope.rot == 32
    assert rope.inv_freq[:8].tolist() == rope.inv_freq[8:].tolist() == pytest.approx([10000 ** (-i / 8) for i in range(8)])


def test_halves_of_heads_are_rotated_by_width_and_height():
    tower = build_tower(config_of("gemma4_vision", head_dim=16, rope_parameters={"rope_type": "axial", "rope_theta": 81.0}))
    tables = [node for node in tower.graph.nodes if node.op == "rope_table"]
    assert [node.attrs["rope"].axes for node in tables] == [(2,) * 4, (1,) * 4]
    assert tables[0].attrs["rope"].inv_freq.tolist() == pytest.approx([1, 1 / 3, 1 / 9, 1 / 27])
    rotations = [node for node in tower.graph.nodes if node.op == "rope"][:4]
    assert [(node.inputs[1], node.attrs["offset"]) for node in rotations] == [
        (table.outputs[0], offset) for _ in "qk" for table, offset in zip(tables, (0, 8), strict=True)
    ]


def test_key_heads_that_query_heads_share():
    config = config_of("gemma4_vision", num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    attention = next(node for node in build_tower(config).graph.nodes if node.op == "encoder_attention")
    assert [value.width for value in attention.inputs] == [48, 16, 16]
    assert (attention.attrs["heads"], attention.attrs["kv_heads"], attention.attrs["scale"]) == (6, 2, 1.0)


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        (
            "qwen2_5_vl_vision",
            {"hidden_act": "gelu"},
            UnsupportedModelError,
            "hidden_act 'gelu' is not supported. Supported: 'silu'",
        ),
        ("qwen2_5_vl_vision", {"fullatt_block_indexes": None}, ConfigError, "fullatt_block_indexes: expected a list of layers"),
        ("qwen2_5_vl_vision", {"num_heads": 5}, ConfigError, "5 does not divide hidden_size 32"),
        ("qwen2_5_vl_vision", {"hidden_size": 36, "num_heads": 2}, UnsupportedModelError, "heads of 18 elements"),
        ("qwen2_5_vl_vision", {"rope_parameters": {"rope_type": "yarn"}}, UnsupportedModelError, "rope_type'. 'yarn'"),
        ("qwen3_vl_vision", {"deepstack_visual_indexes": ["0"]}, ConfigError, "deepstack_visual_indexes"),
        ("siglip_vision_model", {"hidden_act": "silu"}, UnsupportedModelError, "hidden_act 'silu'"),
        ("janus_vision_model", {"use_qk_norm": True}, UnsupportedModelError, "use_qk_norm"),
        ("janus_vision_model", {"mlp_ratio": 0}, ConfigError, "mlp_ratio"),
        ("sam_vision_model", {"use_rel_pos": False}, UnsupportedModelError, "use_rel_pos"),
        ("sam_vision_model", {"global_attn_indexes": ["0"]}, ConfigError, "global_attn_indexes"),
        ("gemma4_vision", {"attention_bias": True}, UnsupportedModelError, "attention_bias"),
        ("gemma4_vision", {"head_dim": 10}, UnsupportedModelError, "head_dim: heads of 10 elements"),
        ("gemma4_vision", {"num_key_value_heads": 3}, ConfigError, "num_key_value_heads: 3 does not divide"),
        ("deepseek_ocr2_encoder", {"layer_types": ["sliding_attention"] * 2}, UnsupportedModelError, "layer_types"),
        (
            "deepseek_ocr2_encoder",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            UnsupportedModelError,
            "rope_type'. 'dynamic'",
        ),
    ],
)
def test_refused(name, fields, error, message):
    with pytest.raises(error, match=message):
        build_tower(config_of(name, **fields))


def test_others_are_no_towers():
    from transformers import LlamaConfig

    with pytest.raises(UnsupportedModelError, match="'llama' is no vision tower with a plan: qwen2_5_vl_vision"):
        build_tower(LlamaConfig())
