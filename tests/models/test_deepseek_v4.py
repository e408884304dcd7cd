"""DeepSeek-V4's fields: what is read, and errors that name a field."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph import attention_mode
from deepseek_optimizer.graph.min_formats import exact_weights, min_formats
from deepseek_optimizer.graph.rope_rotation import key_rotation
from deepseek_optimizer.graph.validate import check_graph
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
        ({"layer_types": None}, "layer_types: expected one entry for each of 4 layers"),
        ({"mlp_layer_types": ["dense"] * 4}, "mlp_layer_types: expected 'hash_moe' or 'moe'"),
        (
            {"compress_rates": {"compressed_sparse_attention": 0, "heavily_compressed_attention": 7}},
            "expected an integer from 1",
        ),
        ({"compress_rates": None}, "compress_rates: expected a number of tokens"),
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
