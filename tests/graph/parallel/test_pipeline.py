"""A model whose layers are divided among processes computes what it computes as a whole; what cannot be divided is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.graph.cache_groups import cached_in
from deepseek_optimizer.graph.ir import Node, Value
from deepseek_optimizer.graph.parallel.layer_shares import Machine
from deepseek_optimizer.graph.parallel.pipeline import divided_as, split_layers
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.ranks import stage_runner
from support.steps import runner

CASES_OF_STAGES = (
    "llama-gqa", "llama-tied", "llama-dynamic", "qwen2-windows", "qwen3-gqa", "smollm3-nope", "granite-factors", "gemma-tied",
    "gemma2-limits", "gemma3_text-two-ropes", "exaone4-types", "stablelm-parallel", "cohere2-types", "mixtral-window",
    "qwen3_moe-plain", "deepseek_v2-greedy", "deepseek_v3-groups", "deepseek_v32-indexer", "phi3-scaled", "olmo2-gqa",
)  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES_OF_STAGES if case in CASES])
def test_logits_are_those_of_the_whole_model(case, fused):
    model = random_model(CASES[case]())
    graph = cached_in(build_graph(model.config), "fp32")
    graph = rules.apply(graph)[0] if fused else graph
    weights, ids = weights_of(model), random_ids(model.config, 70)
    whole = runner(ReferenceBackend(), graph, weights).logits(ids, chunks=(33,))
    for ranks in (2, 3):
        divided = stage_runner(graph, weights, ranks).logits(ids, chunks=(33,))
        assert_close_rows(divided, whole, 1e-5)


@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups", "gemma3_text-two-ropes"])
def test_stages_are_well_formed_and_have_each_weight_once(case):
    graph = rules.apply(cached_in(build_graph(CASES[case]()), "fp32"))[0]
    stages = split_layers(graph, 2, lambda name: 1)
    for stage in stages:
        check_graph(stage.graph)
    check_graph(stages[0].tail)
    names = [name for stage in stages for name in stage.weights()]
    twice = {name for name in names if names.count(name) > 1}
    assert set(names) == set(weight_shapes(graph)) and all("layernorm" in name for name in twice)
    assert sorted(layer for stage in stages for layer in stage.cached) == list(range(graph.cache.layers))


def test_another_graph_of_the_same_layers_is_divided_in_the_same_way():
    graph = rules.apply(cached_in(build_graph(llama(num_hidden_layers=6)), "fp32"))[0]
    stages = split_layers(graph, 3, lambda name: 1, [Machine(1, 1.0), Machine(1000, 9.0), Machine(1, 1.0)])
    assert [stage.end for stage in stages] != [2, 4, 6] and divided_as(graph, stages) == stages
    renamed = replace(graph, nodes=[node.with_(weights=tuple(f"{name}'" for name in node.weights)) for node in graph.nodes])
    others = divided_as(renamed, stages)
    assert [stage.weights() for stage in others] == [[f"{name}'" for name in stage.weights()] for stage in stages]
    assert [stage.cached for stage in others] == [stage.cached for stage in stages]


@pytest.mark.parametrize(
    ("config", "ranks", "error", "text"),
    [
        (llama, 9, ConfigError, "pipeline=9 processes cannot divide 3 layers; use fewer"),
        (CASES["lfm2-mixed"], 2, UnsupportedModelError, "load it without parallel"),
        (CASES["deepseek_v4-mixed"], 2, UnsupportedModelError, "or their latents"),
    ],
)
def test_refused(config, ranks, error, text):
    with pytest.raises(error, match=text):
        split_layers(build_graph(config()), ranks, lambda name: 1)


@pytest.mark.parametrize("layer", [0, 2])
def test_token_ids_are_read_in_the_first_process_only(layer):
    """The others are not told the tokens of later steps."""
    graph = build_graph(llama())
    at = next(i for i, node in enumerate(graph.nodes) if node.attrs.get("layer") == layer)
    lookup = Node("lookup", (), (Value("table", 16),), ("table",), {"entries": graph.vocab_size})
    graph = replace(graph, nodes=[*graph.nodes[:at], lookup, *graph.nodes[at:]])
    if layer == 0:
        assert split_layers(graph, 3, lambda name: 1)[0].graph.looks_up
    else:
        with pytest.raises(UnsupportedModelError, match="later layers read token ids"):
            split_layers(graph, 3, lambda name: 1)
