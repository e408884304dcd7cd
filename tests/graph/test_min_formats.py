"""Weights that stay in a larger format than the others."""

from __future__ import annotations

import pytest

from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.min_formats import min_formats
from deepseek_optimizer.models import build_graph
from support.models import CASES


@pytest.mark.parametrize(
    ("case", "gates"), [("qwen3_5_text-mixed", ["in_proj_a", "in_proj_b"]), ("qwen3_next-experts", ["in_proj_ba"])]
)
def test_gates_of_the_delta_rule(case: str, gates: list[str]) -> None:
    graph = build_graph(CASES[case]())
    expected = {f"model.layers.{layer}.linear_attn.{gate}.weight": "int8" for layer in (0, 2, 3) for gate in gates}
    assert min_formats(graph) == min_formats(rules.apply(graph)[0]) == expected


def test_models_without_such_weights() -> None:
    assert min_formats(build_graph(CASES["lfm2-mixed"]())) == {}
