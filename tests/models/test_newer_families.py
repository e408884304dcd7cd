"""Graphs of Ministral 3, Mistral 4, GLM-5, Llama 4 and of hybrid models, and the configs that they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.integration.configs import check_config
from deepseek_optimizer.models import build_graph
from support.family_configs import glm_moe_dsa, kimi_linear, lfm2, llama4_text, ministral3, mistral4, qwen3_5_text


def damaged(config: Any, *without: str, **rope: Any) -> dict[str, Any]:
    """A config.json with changed `rope_parameters`."""
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    raw["rope_parameters"] = {k: v for k, v in {**raw["rope_parameters"], **rope}.items() if k not in without}
    return raw


@pytest.mark.parametrize("config", [ministral3, mistral4])
def test_every_layer_scales_its_queries(config: Callable[..., Any]) -> None:
    nodes = [n for n in build_graph(config(max_position_embeddings=4096)).nodes if n.op == "position_scale"]
    assert [n.attrs for n in nodes] == [{"beta": 0.4, "length": 19, "offset": 0}] * 3


@pytest.mark.parametrize("config", [ministral3, mistral4])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"llama_4_scaling_beta": None}, "llama_4_scaling_beta"),
        ({"llama_4_scaling_beta": -0.1}, "llama_4_scaling_beta"),
        ({"original_max_position_embeddings": 19.5}, "original_max_position_embeddings"),
    ],
)
def test_bad_position_scales(config: Callable[..., Any], rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(damaged(config(), **rope))


def test_rope_of_whole_heads_in_mistral4() -> None:
    """Transformers' own forward fails on this."""
    with pytest.raises(UnsupportedModelError, match="rope_type 'default'"):
        check_config(damaged(mistral4(), rope_type="default"))
    with pytest.raises(ConfigError, match=r"partial_rotary_factor.*16 rotated elements.*qk_rope_head_dim is 12"):
        check_config(damaged(mistral4(), partial_rotary_factor=0.5))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["shared", "full", "full", "full"], "the first layer is 'shared'"),
        (["full", "shared"], "for each of 4 layers"),
        (["full", "none", "full", "full"], "expected 'full' or 'shared'"),
        ("full", "expected 'full' or 'shared'"),
    ],
)
def test_bad_indexer_types(kinds: Any, message: str) -> None:
    raw = json.loads(glm_moe_dsa().to_json_string(use_diff=False))
    with pytest.raises(ConfigError, match=message):
        check_config({**raw, "indexer_types": kinds})


def test_shared_layers_read_the_choice_of_the_last_full_one() -> None:
    nodes = build_graph(glm_moe_dsa()).nodes
    chosen = [n.inputs[1].name for n in nodes if n.op == "mla_attention"]
    assert chosen == ["l0.index_chosen", "l1.index_chosen", "l1.index_chosen", "l1.index_chosen"]
    assert [n.attrs["layer"] for n in nodes if n.op == "index_write"] == [0, 1]


def test_layers_of_llama4() -> None:
    """Layers 0 and 2 have RoPE and chunks, the others full attention and growing queries; 1 and 3 have experts."""
    nodes = build_graph(llama4_text()).nodes
    attentions = [(n.attrs["window"], n.attrs.get("chunked", False)) for n in nodes if n.op == "attention"]
    assert attentions == [(27, True), (0, False)] * 2
    ops_of = [[n.op for n in nodes if any(v.name.startswith(f"l{i}.") for v in n.outputs)] for i in range(4)]
    assert ["rope" in ops for ops in ops_of] == ["head_norm" in ops for ops in ops_of] == [True, False] * 2
    assert ["position_scale" in ops for ops in ops_of] == ["experts_down" in ops for ops in ops_of] == [False, True] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_chunk_size", 0), ("floor_scale", 0), ("attn_scale", -0.1), ("moe_layers", "1"), ("moe_layers", [1.5]),
        ("no_rope_layers", [1, 0]), ("layer_types", ["full_attention"]), ("num_experts_per_tok", 7),
    ],
)  # fmt: skip
def test_bad_fields_of_llama4(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        check_config({**json.loads(llama4_text().to_json_string(use_diff=False)), field: value})


@pytest.mark.parametrize(
    ("config", "kind"), [(qwen3_5_text, "linear_attention"), (lfm2, "conv"), (kimi_linear, "linear_attention")]
)
def test_a_model_without_attention(config: Callable[..., Any], kind: str) -> None:
    """Transformers' own forward fails on this."""
    raw: dict[str, Any] = json.loads(config().to_json_string(use_diff=False))
    raw["layer_types"] = [kind] * raw["num_hidden_layers"]
    with pytest.raises(ConfigError, match="no layer has attention"):
        check_config(raw)
