"""Graphs of Ministral 3, Mistral 4 and GLM-5, and the configs that they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.integration.configs import check_config
from deepseek_optimizer.models import build_graph
from support.models import glm_moe_dsa, ministral3, mistral4


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
