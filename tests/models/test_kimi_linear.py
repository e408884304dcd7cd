"""Kimi Linear's published config, which names layers and sizes in a section of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.integration.configs import check_config, with_defaults
from deepseek_optimizer.models import build_graph
from support.family_configs import kimi_linear

PUBLISHED = {"linear_attn_config": {
    "full_attn_layers": [2], "kda_layers": [1, 3, 4], "head_dim": 20, "num_heads": 3, "short_conv_kernel_size": 4,
}, "first_k_dense_replace": 1}  # fmt: skip


def raw(**fields: Any) -> dict[str, Any]:
    read = json.loads(kimi_linear().to_json_string(use_diff=False))
    others = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    return {**{name: value for name, value in read.items() if name not in others}, **PUBLISHED, **fields}


def test_the_published_form_gives_the_same_graph() -> None:
    check_config(raw())
    published, own = build_graph(with_defaults(raw())), build_graph(kimi_linear())
    assert published.states == own.states and published.cache == own.cache
    assert [(n.op, n.weights) for n in published.nodes] == [(n.op, n.weights) for n in own.nodes]


@pytest.mark.parametrize(
    "section", [{"full_attn_layers": [2], "kda_layers": [1, 3]}, {"full_attn_layers": 2, "kda_layers": []}]
)
def test_lists_that_do_not_name_every_layer_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="linear_attn_config: full_attn_layers and kda_layers must name each of 4 layers"):
        check_config(raw(linear_attn_config={**PUBLISHED["linear_attn_config"], **section}))


def test_a_section_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear_attn_config: expected an object"):
        check_config(raw(linear_attn_config=[1]))
