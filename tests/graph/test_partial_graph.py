"""The graph from a hidden state on is valid, and contains only the ops that follow."""

from __future__ import annotations

import pytest

from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.partial_graph import graph_from_hidden_state, latest_start
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support.models import CASES


@pytest.mark.parametrize("case", ["llama-tied", "qwen3-gqa", "qwen2-windows", "deepseek_v32-indexer"])
@pytest.mark.parametrize("index", range(4))
def test_remaining_nodes_of_a_model(case: str, index: int) -> None:
    graph = build_graph(CASES[case]())
    rest = graph_from_hidden_state(graph, index)
    check_graph(rest)
    check_graph(rules.apply(rest)[0])
    layers = {n.attrs["layer"] for n in rest.nodes if n.op in ("attention", "mla_attention")}
    assert layers == set(range(index, 3))
    assert sum(n.op == "rope_table" for n in rest.nodes) == (index < 3)
    assert not any(f"layers.{i}." in name for name in rest.weights() for i in range(index))
    assert rest.nodes[-1] == graph.nodes[-1]


@pytest.mark.parametrize(("index", "restart"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 4)])
def test_layers_that_share_a_choice_are_computed_together(index: int, restart: int) -> None:
    """Layers 2 and 3 read the tokens that layer 1 chose."""
    graph = build_graph(CASES["glm_moe_dsa-shared"]())
    assert latest_start(graph, index) == restart
    check_graph(graph_from_hidden_state(graph, restart))


def test_layers_that_read_the_cache_of_others_begin_with_these() -> None:
    """Layers 3 and 4 of Gemma 4 read layer 2's keys, layer 5 reads layer 1's; the embeddings per layer are looked up again."""
    graph = build_graph(CASES["gemma4_text-shared"]())
    assert [latest_start(graph, index) for index in range(7)] == [0, 1, 1, 1, 1, 1, 6]
    rest = graph_from_hidden_state(graph, 1)
    check_graph(rest)
    check_graph(rules.apply(rest)[0])
    assert [n.op for n in rest.nodes[:3]] == ["embedding", "lookup", "lookup"]
    assert rest.nodes[1].weights == graph.nodes[0].weights and rest.nodes[1].attrs["scale"] == graph.nodes[0].attrs["scale"]
