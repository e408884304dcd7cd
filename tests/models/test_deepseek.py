"""DeepSeek's families: published configs, the graphs built from them, and every kind of invalid config."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph.analysis import stack_shapes
from deepseek_optimizer.graph.ir import LatentSpec
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.integration.configs import check_config, with_defaults
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v2, deepseek_v3, deepseek_v32, rope, youtu

V2_LITE = {
    "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V2 = {
    **V2_LITE, "first_k_dense_replace": 1, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "n_group": 8, "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
}  # fmt: skip
V3 = {
    "model_type": "deepseek_v3", "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
V32 = {**V3, "model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
PUBLISHED = {"V2-Lite": V2_LITE, "V2": V2, "V3": V3, "V3.2": V32}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    """As in a file, and as read by Transformers' class."""
    from transformers import CONFIG_MAPPING

    raw = json.loads(json.dumps(PUBLISHED[name]))
    check_config(raw)
    graphs = [build_graph(with_defaults(raw)), build_graph(CONFIG_MAPPING[raw["model_type"]].from_dict(raw))]
    for graph in graphs:
        check_graph(graph)
        assert graph.cache == LatentSpec(raw["num_hidden_layers"], 512, 64, 128 if name == "V3.2" else 0)
    nodes = zip(*(g.nodes for g in graphs), strict=True)
    assert all((a.op, a.weights, a.outputs) == (b.op, b.weights, b.outputs) for a, b in nodes)
    attention = next(n for n in graphs[0].nodes if n.op == "mla_attention")
    mscale = 0.1 * raw["rope_scaling"]["mscale_all_dim"] * math.log(40) + 1
    assert attention.attrs["scale"] == pytest.approx(192**-0.5 * mscale**2)
    router = next(n for n in graphs[0].nodes if n.op == "router").attrs
    groups = (1, 1) if name == "V2-Lite" else (8, raw["topk_group"])
    assert (router["groups"], router["top_groups"]) == groups and router["scale"] == raw["routed_scaling_factor"]
    assert sum(n.op == "router" for n in graphs[0].nodes) == raw["num_hidden_layers"] - raw["first_k_dense_replace"]


def test_cache_bytes_of_v2_lite() -> None:
    """(512 + 64) elements of two bytes in each of 27 layers."""
    graph = build_graph(with_defaults(V2_LITE))
    assert ReferenceBackend().block_bytes(graph, "bf16") == 32 * 31_104
    assert ReferenceBackend().block_bytes(graph, "fp32") == 32 * 2 * 31_104
    assert ReferenceBackend().block_bytes(graph, "int8") == 32 * 27 * (512 + 4 * 4 + 2 * 64)
    assert ReferenceBackend().block_bytes(build_graph(with_defaults(V32)), "bf16") == 32 * 61 * 2 * (512 + 64 + 128)


def test_stacks_of_v2_lite() -> None:
    stacks = stack_shapes(build_graph(with_defaults(V2_LITE)))
    assert len(stacks) == 2 * 26
    assert stacks["model.layers.1.mlp.experts.gate_up_proj"] == (128, 1408, 2048)
    assert stacks["model.layers.26.mlp.experts.down_proj"] == (64, 2048, 1408)


RAW = {
    "deepseek_v2": {**json.loads(deepseek_v2().to_json_string(use_diff=False)), "topk_method": "group_limited_greedy",
                    "n_group": 3, "topk_group": 2},
    "deepseek_v3": json.loads(deepseek_v3().to_json_string(use_diff=False)),
    "deepseek_v32": json.loads(deepseek_v32().to_json_string(use_diff=False)),
    "youtu": json.loads(youtu().to_json_string(use_diff=False)),
}  # fmt: skip
BAD_INTEGERS = [0, -1, 10**9, 10**400, 1.5, "8", True, [], math.nan]
OF_LATENTS = ["num_attention_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
OF_EXPERTS = ["n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size", "n_shared_experts"]
OF_INDEXER = ["index_topk", "index_head_dim", "index_n_heads"]
INTEGERS = [
    *((family, field) for family in RAW for field in OF_LATENTS),
    *((family, field) for family in ("deepseek_v2", "deepseek_v3", "deepseek_v32") for field in OF_EXPERTS),
    *(("deepseek_v32", field) for field in OF_INDEXER),
]


@pytest.mark.parametrize("family", RAW)
def test_the_modified_configs_are_valid_originally(family: str) -> None:
    check_config(RAW[family])


@pytest.mark.parametrize(("family", "field"), INTEGERS)
@pytest.mark.parametrize("value", BAD_INTEGERS)
def test_invalid_integers_are_rejected_by_name(family: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"config\.{field}: .*got"):
        check_config({**RAW[family], field: value})


@pytest.mark.parametrize("value", [-1, 4097, 1.5, "1", True, None])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_bad_count_of_dense_layers(family: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="first_k_dense_replace"):
        check_config({**RAW[family], "first_k_dense_replace": value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "2", None, True])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_bad_scale_of_experts(family: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="routed_scaling_factor"):
        check_config({**RAW[family], "routed_scaling_factor": value})


@pytest.mark.parametrize(
    ("family", "field"),
    [("deepseek_v3", "rope_interleave"), ("youtu", "rope_interleave"), ("deepseek_v3", "norm_topk_prob"),
     ("deepseek_v2", "mlp_bias"), ("deepseek_v32", "attention_bias"), ("youtu", "tie_word_embeddings")],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, 1, "yes", None, {}])
def test_bad_flag(family: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        check_config({**RAW[family], field: value})


V2_V3 = ("deepseek_v2", "deepseek_v3", "deepseek_v32")
CONTRADICTIONS = [
    (V2_V3, {"num_experts_per_tok": 13}, "num_experts_per_tok: cannot choose 13 of n_routed_experts 12"),
    (V2_V3, {"n_group": 5}, "n_group: 5 does not divide n_routed_experts 12"),
    (V2_V3, {"topk_group": 4}, "topk_group: cannot choose 4 of n_group 3"),
    (V2_V3, {"num_experts_per_tok": 9}, "num_experts_per_tok: cannot choose 9 from topk_group 2"),
    (("deepseek_v3", "deepseek_v32"), {"n_group": 12}, "n_group: 12 groups have one expert"),
    (V2_V3, {"n_shared_experts": 16000, "moe_intermediate_size": 16000}, "n_shared_experts"),
    (V2_V3, {"n_routed_experts": 12000, "moe_intermediate_size": 1 << 20, "n_shared_experts": 1}, "n_routed_experts"),
    (tuple(RAW), {"qk_rope_head_dim": 7}, "qk_rope_head_dim: RoPE needs an even number"),
    (tuple(RAW), {"num_key_value_heads": 1}, "num_key_value_heads"),
    (tuple(RAW), {"num_attention_heads": 16384, "num_key_value_heads": 16384, "qk_nope_head_dim": 512}, "qk_nope_head_dim"),
    (tuple(RAW), {"v_head_dim": 1 << 20}, "v_head_dim"),
    (tuple(RAW), {"kv_lora_rank": 1 << 20}, "kv_lora_rank"),
    (tuple(RAW), rope("yarn", factor=4.0, mscale=-1.0), "mscale"),
    (tuple(RAW), rope("yarn", factor=4.0, mscale_all_dim="1"), "mscale_all_dim"),
    (tuple(RAW), rope("default", partial_rotary_factor=0.5) | rope("yarn", factor=2.0, partial_rotary_factor=0.5), "partial"),
    (("deepseek_v2",), {"hidden_size": 76}, "num_attention_heads: 6 does not divide"),
    (("deepseek_v32",), {"q_lora_rank": None}, "q_lora_rank"),
    (("deepseek_v32",), {"index_head_dim": 10}, "index_head_dim: 10 is less than qk_rope_head_dim"),
    (("deepseek_v32",), {"index_n_heads": 16384, "index_head_dim": 128}, "index_head_dim"),
    (("deepseek_v32",), {"max_position_embeddings": (1 << 24) + 1}, "max_position_embeddings"),
    (("deepseek_v32",), {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
    (("deepseek_v32",), {"mlp_layer_types": ["dense", "sparse", "linear"]}, "mlp_layer_types"),
    (("deepseek_v32",), {"mlp_layer_types": "dense"}, "mlp_layer_types"),
]
UNKNOWN = [
    (("deepseek_v2",), {"topk_method": "noaux_tc"}), (("deepseek_v2",), {"topk_method": None}),
    (("deepseek_v2",), {"scoring_func": "sigmoid"}), (("deepseek_v2",), {"norm_topk_prob": True}),
    (("deepseek_v2",), {"norm_topk_prob": 1}), (("deepseek_v3", "deepseek_v32"), {"topk_method": "greedy"}),
    (("deepseek_v3", "deepseek_v32"), {"scoring_func": "softmax"}), (("deepseek_v2", "deepseek_v3"), {"moe_layer_freq": 2}),
    (("deepseek_v2", "deepseek_v3"), {"moe_layer_freq": True}), (tuple(RAW), {"hidden_act": "gelu"}),
    (("deepseek_v3", "deepseek_v32", "youtu"), {"mlp_bias": True}), (("deepseek_v32",), {"rope_interleave": False}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "message"), [(f, *rest) for fs, *rest in CONTRADICTIONS for f in fs])
def test_contradictions_name_the_field(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config({**RAW[family], **fields})


@pytest.mark.parametrize(("family", "fields"), [(f, fields) for fs, fields in UNKNOWN for f in fs])
def test_unsupported_features_are_rejected_by_name(family: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(fields))):
        check_config({**RAW[family], **fields})


def test_mscale_of_zero_is_none() -> None:
    """As in DeepSeek's code."""
    none = {"mscale": 0, "mscale_all_dim": 0}
    plain, zero = (
        build_graph(with_defaults({**RAW["deepseek_v3"], **rope("yarn", factor=4.0, **more)})) for more in ({}, none)
    )
    assert [n.attrs.get("scale") for n in plain.nodes] == [n.attrs.get("scale") for n in zero.nodes]


def test_expert_fields_are_ignored_without_experts() -> None:
    graph = build_graph(
        with_defaults({**RAW["deepseek_v2"], "first_k_dense_replace": 3, "n_group": 5, "num_experts_per_tok": None})
    )
    assert not any(n.op == "router" for n in graph.nodes)
