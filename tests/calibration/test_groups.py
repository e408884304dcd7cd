"""Which matrices get a format together."""

from __future__ import annotations

import pytest

from deepseek_optimizer.calibration.groups import Group, format_groups
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import CacheSpec, Graph, Node, Value
from deepseek_optimizer.models import build_graph
from support.models import CASES


def groups_of(case: str) -> list[Group]:
    graph, _ = rules.apply(build_graph(CASES[case]()))
    return format_groups(graph, [n for n in graph.weights() if n.endswith("_proj.weight") or "embed" in n or "head" in n])


@pytest.mark.parametrize("case", ["llama-biases", "qwen3-gqa", "llama-tied"])
def test_the_groups_of_a_decoder(case: str) -> None:
    groups = groups_of(case)
    tied = case.endswith("tied")
    layer = [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    expected = [Group(("model.embed_tokens.weight",), None)]
    expected += [Group(tuple(f"model.layers.{i}.{n}.weight" for n in names), i) for i in range(3) for names in layer]
    expected += [] if tied else [Group(("lm_head.weight",), 3)]
    assert groups == expected


def test_nodes_that_share_a_matrix_form_one_group() -> None:
    x, a, b, c = (Value(name, 32) for name in "xabc")
    nodes = [
        Node("embedding", (), (x,), ("e",)),
        Node("hidden_out", (x,), attrs={"index": 0}),
        Node("linear", (x,), (a,), ("one",)),
        Node("hidden_out", (a,), attrs={"index": 1}),
        Node("linear", (a,), (b,), ("two",)),
        Node("experts", (b,), (c,), ("two", "three", "one", "norm")),
        Node("lm_head", (c,), (Value("logits", 8),), ("h",)),
    ]
    graph = Graph("none", nodes, 8, 32, 2, CacheSpec(1, 1, 32), 64)
    actual = format_groups(graph, ["e", "one", "two", "three", "h"])
    assert actual == [Group(("e",), None), Group(("one", "two", "three"), 0), Group(("h",), 1)]
