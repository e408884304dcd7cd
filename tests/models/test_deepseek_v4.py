"""DeepSeek-V4's fields: what is read, and errors that name a field."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import DeepseekV4Config

from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph import attention_mode
from deepseek_optimizer.graph.min_formats import exact_weights, min_formats
from deepseek_optimizer.graph.partial_graph import writing_graph
from deepseek_optimizer.graph.printing import to_text
from deepseek_optimizer.graph.rope_rotation import key_rotation
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.integration.configs import check_config, with_defaults
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v4


def fields(**changes: Any) -> dict[str, Any]:
    return {**deepseek_v4().to_dict(), **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"n_shared_experts": 2}, "n_shared_experts 2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"o_groups": 7}, "o_groups: 7 groups"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types: 'full_attention' is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: expected one entry for each of 4 layers"),
        ({"layer_types": None, "compress_ratios": [4, 2, 0, 0]}, "compress_ratios: 2 is not supported"),
        ({"layer_types": None, "compress_ratios": [4]}, "compress_ratios: expected a number for each of 4 layers"),
        ({"mlp_layer_types": ["dense"] * 4}, "mlp_layer_types: expected 'hash_moe' or 'moe'"),
        (
            {"compress_rates": {"compressed_sparse_attention": 0, "heavily_compressed_attention": 7}},
            "expected an integer from 1",
        ),
        ({"compress_rates": [4]}, "compress_rates: expected a number of tokens"),
        ({"index_head_dim": 4}, "index_head_dim: 20 heads of 4"),
        ({"hc_mult": 0}, "hc_mult: expected an integer from 1"),
        ({"hc_mult": 64, "hidden_size": 1 << 15}, "64 streams of 32768 elements"),
        ({"head_dim": 21}, "head_dim: expected an even number"),
        ({"swiglu_limit": 0.0}, "swiglu_limit: expected a finite number above 0"),
        ({"num_experts_per_tok": 7}, "cannot choose 7 of n_routed_experts 6"),
        ({"max_position_embeddings": 1 << 25}, "at most 16777216 with an indexer"),
    ],
)
def test_invalid_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_graph({**fields(), **changes})


@pytest.mark.parametrize("changes", [{}, {"compress_ratios": None, "num_hash_layers": None, "rope_scaling": None}])
def test_a_published_config_is_read_as_transformers_does(changes: dict[str, Any]) -> None:
    raw = {
        "model_type": "deepseek_v4", "vocab_size": 99, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 5,
        "num_attention_heads": 4, "head_dim": 64, "qk_rope_head_dim": 8, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "num_hash_layers": 2, "compress_ratios": [0, 0, 4, 128, 4, 0],
        "rope_theta": 10000, "compress_rope_theta": 160000, "index_head_dim": 16, "index_n_heads": 4, "expert_dtype": "fp4",
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32},
    }  # fmt: skip
    raw = {name: value for name, value in {**raw, **changes}.items() if value is not None}
    check_config(raw)
    own, theirs = build_graph(with_defaults(raw)), build_graph(DeepseekV4Config(**raw))
    assert to_text(own) == to_text(theirs) and own.cache == theirs.cache
    for a, b in zip(own.nodes, theirs.nodes, strict=True):
        if a.op in ("rope_table", "compress"):
            assert a.attrs["rope"].inv_freq.tolist() == b.attrs["rope"].inv_freq.tolist()
            assert a.attrs["rope"].scaling == b.attrs["rope"].scaling


def test_what_the_graph_keeps_exact() -> None:
    graph = build_graph(deepseek_v4())
    check_graph(graph)
    exact, least = exact_weights(graph), min_formats(graph)
    layer = "model.layers.0"
    assert {f"{layer}.attn_hc.fn", f"{layer}.mlp.gate.weight", "model.hc_head.hc_fn"} <= exact
    assert f"{layer}.mlp.gate.tid2eid" not in exact  # integers
    compressor = f"{layer}.self_attn.compressor"
    assert least[f"{compressor}.gate_proj.weight"] == least[f"{compressor}.indexer.q_b_proj.weight"] == "int8"
    assert graph.looks_up and graph.hidden_states == 1
    assert writing_graph(graph) is None  # it has no hidden states between layers to tell where they end


def test_kinds_of_rows() -> None:
    rows = build_graph(deepseek_v4()).cache.rows
    kinds = [(kind.width, kind.every, kind.window, kind.rounded) for kind in rows]
    sparse = [(20, 1, 21, True), (80, 1, 6, False), (20, 3, 0, True), (48, 1, 6, False), (12, 3, 0, False)]
    assert kinds == [*sparse, (20, 1, 21, True), (40, 1, 7, False), (20, 7, 0, True), (20, 1, 21, True), *sparse]


def test_modes_and_windows_of_the_cache() -> None:
    graph = build_graph(deepseek_v4())
    sparse = attention_mode.AttentionMode("sparse", window=32, sinks=4, budget=256)
    assert attention_mode.apply_mode(graph, sparse) == (graph, [])
    with pytest.raises(UnsupportedModelError, match="'sliding' is not supported with compressed attention"):
        attention_mode.apply_mode(graph, attention_mode.AttentionMode("sliding", window=32, sinks=4))
    with pytest.raises(UnsupportedModelError, match="cannot be moved"):
        key_rotation(graph)
