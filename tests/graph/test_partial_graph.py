"""Parts of graphs are valid, and contain only the ops that they are to compute."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepseek_optimizer.errors import GraphError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.partial_graph import graph_between, graph_from_hidden_state, halves_over_cache, latest_start
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_encoder_graph, build_graph
from support.encoders import random_encoder
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


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (1, 3), (2, 3)])
def test_layers_of_an_encoder(begin: int, end: int) -> None:
    graph = build_encoder_graph(random_encoder("modernbert").config)
    part = graph_between(graph, begin, end)
    check_graph(part)
    check_graph(rules.apply(part)[0])
    assert {int(name.split(".")[1]) for name in part.weights() if name.startswith("layers.")} == {*range(begin, end)}
    assert [n.attrs["index"] for n in part.nodes if n.op == "hidden_out"] == [0] and part.hidden_states == 1
    assert part.nodes[-1].inputs == next(n.inputs for n in graph.nodes if n.op == "hidden_out" and n.attrs["index"] == end)


def test_halves_of_a_layer() -> None:
    """Together they have the weights of the layer, each matrix once; only the norm before the attention is in both."""
    layer = graph_between(build_encoder_graph(random_encoder("modernbert").config), 1, 2)
    write, read = halves_over_cache(layer)
    for half in (write, read):
        check_graph(half)
        check_graph(rules.apply(half)[0])
    assert [n.op for n in write.nodes if n.op in ("cache_write", "attention")] == ["cache_write"]
    assert [n.op for n in read.nodes if n.op in ("cache_write", "attention")] == ["attention"]
    assert {*write.weights(), *read.weights()} == {*layer.weights()}
    assert {n.split(".")[2] for n in {*write.weights()} - {"layers.1.attn_norm.weight"}} == {"attn"}
    with pytest.raises(GraphError, match="before it is written"):
        check_graph(replace(read, written=()))
