"""Graphs with an attention mode: which layers change, what the cache stores, which tokens may be dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepseek_optimizer import DeepSeekConfig
from deepseek_optimizer.errors import ConfigError, GraphError, UnsupportedModelError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode, forgetting
from deepseek_optimizer.graph.ir import Graph, LatentSpec, Value
from deepseek_optimizer.graph.planner import assign_slots
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support.family_configs import deepseek_v2, deepseek_v3, deepseek_v32, llama, llama4_text, qwen2, qwen3
from support.models import CASES

SLIDING = AttentionMode("sliding", 70, 4)
SPARSE = AttentionMode("sparse", 40, 4, 160)


def in_mode(config: object, mode: AttentionMode, names: list[str] | None = None) -> tuple[Graph, list[str]]:
    return apply_mode(rules.apply(build_graph(config), names)[0], mode)


@pytest.mark.parametrize("mode", [SLIDING, SPARSE], ids=lambda m: m.kind)
@pytest.mark.parametrize("case", CASES)
def test_graphs_of_every_family_stay_valid(case: str, mode: AttentionMode) -> None:
    for names in (None, []):
        plain, _ = rules.apply(build_graph(CASES[case]()), names)
        if case.startswith("deepseek_v4") and mode is SLIDING:
            with pytest.raises(UnsupportedModelError, match="compressed attention"):
                apply_mode(plain, mode)
            continue
        graph, places = apply_mode(plain, mode)
        check_graph(graph)
        assign_slots(graph)
        needed, had = weight_shapes(graph), weight_shapes(plain)
        assert needed.items() <= had.items()
        gone = set(had) - set(needed)
        assert not gone or (mode is SLIDING and all(".indexer." in name for name in gone))
        changed = [n for n in graph.nodes if n.op in ("attention", "mla_attention") and n not in plain.nodes]
        assert places == [f"layer {n.attrs['layer']}" for n in changed]
        assert all(n.attrs.get("softmax", "online") == "online" for n in changed)
        assert apply_mode(plain, AttentionMode()) == (plain, [])


def test_smaller_windows_of_the_model_are_kept() -> None:
    config = qwen3(use_sliding_window=True, sliding_window=50, layer_types=["sliding_attention", "full_attention"] * 2,
                   num_hidden_layers=4)  # fmt: skip

    def spans(mode: AttentionMode) -> list[tuple[int, int]]:
        graph, _ = in_mode(config, mode)
        return [(n.attrs["window"], n.attrs.get("sinks", 0)) for n in graph.nodes if n.op == "attention"]

    assert spans(AttentionMode()) == [(50, 0), (0, 0)] * 2
    assert spans(SLIDING) == [(50, 0), (70, 4)] * 2
    assert spans(AttentionMode("sliding", 50, 9)) == [(50, 0), (50, 9)] * 2
    assert spans(AttentionMode("sliding", 32, 4)) == [(32, 4)] * 4
    assert spans(SPARSE) == [(50, 0), (0, 0)] * 2
    graph, places = in_mode(config, SPARSE)
    assert places == ["layer 1", "layer 3"] and [n.attrs["layer"] for n in graph.nodes if n.op == "block_choose"] == [1, 3]


def test_smaller_chunks_of_the_model_are_kept() -> None:
    """Larger ones become windows with sinks, like the layers that see everything."""

    def spans(mode: AttentionMode) -> list[tuple[int, int, bool]]:
        nodes = [n.attrs for n in in_mode(llama4_text(), mode)[0].nodes if n.op == "attention"]
        return [(a["window"], a.get("sinks", 0), a.get("chunked", False)) for a in nodes]

    assert spans(AttentionMode()) == spans(SPARSE) == [(27, 0, True), (0, 0, False)] * 2
    assert spans(SLIDING) == [(27, 0, True), (70, 4, False)] * 2
    assert spans(AttentionMode("sliding", 20, 4)) == [(20, 4, False)] * 4


def test_cached_tokens() -> None:
    assert in_mode(llama(), SPARSE)[0].cache.summaries and not in_mode(llama(), SLIDING)[0].cache.summaries
    assert in_mode(deepseek_v2(), SPARSE)[0].cache.summaries
    windows = qwen3(use_sliding_window=True, sliding_window=9, max_window_layers=0)
    assert not in_mode(windows, SPARSE)[0].cache.summaries  # no layer uses them


def test_a_trained_indexer() -> None:
    """It performs sparse attention itself; with a window it is not used, and its keys are not cached."""
    plain, _ = rules.apply(build_graph(deepseek_v32()))
    assert apply_mode(plain, SPARSE) == (plain, [])
    graph, places = apply_mode(plain, SLIDING)
    assert places == ["layer 0", "layer 1", "layer 2"]
    assert not [n for n in graph.nodes if n.op.startswith("index_") or any("indexer" in w for w in n.weights)]
    assert isinstance(graph.cache, LatentSpec) and graph.cache.index == 0 and plain.cache.index == 24
    assert graph.cache.elements_per_token < plain.cache.elements_per_token


def test_droppable_tokens() -> None:
    def span(config: object, mode: AttentionMode) -> tuple[int, int] | None:
        return forgetting(in_mode(config, mode)[0])

    everywhere = {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 0}
    for config in (llama(), deepseek_v2(), deepseek_v3(), deepseek_v32()):
        assert span(config, AttentionMode()) is None
        assert span(config, SPARSE) is None
        assert span(config, SLIDING) == (70, 4)
    assert span(qwen2(**everywhere), AttentionMode()) == span(qwen2(**everywhere), SPARSE) == (50, 0)
    assert span(qwen2(**everywhere), SLIDING) == (50, 0)
    assert span(qwen2(**everywhere), AttentionMode("sliding", 33, 2)) == (33, 2)
    half = {**everywhere, "max_window_layers": 1}
    assert span(qwen2(**half), AttentionMode()) is None and span(qwen2(**half), SLIDING) == (70, 4)


def test_modes_of_settings() -> None:
    assert DeepSeekConfig().attention == AttentionMode()
    assert DeepSeekConfig(attention_optimization="sliding").attention == AttentionMode("sliding", 4096, 4, 2048)
    assert DeepSeekConfig(sparse_attention=True).attention == AttentionMode("sparse", 512, 4, 2048)
    with pytest.raises(ConfigError, match="attention_budget: 96 tokens"):
        AttentionMode("sparse", 32, 1, 96)
    assert AttentionMode("sparse", 32, 1, 128).blocks == AttentionMode("sparse", 32, 1, 159).blocks == 4


DAMAGES = {
    "chosen beside a window": ("attention", {"window": 40}),
    "chosen and the score matrix": ("attention", {"softmax": "eager"}),
    "an unknown softmax": ("attention", {"softmax": "fast"}),
    "nothing left to choose": ("block_choose", {"sinks": 64, "window": 40}),
    "no window": ("block_choose", {"window": 0}),
    "other heads": ("block_choose", {"heads": 4}),
    "blocks": ("block_choose", {"blocks": 6}),
    "chosen beside a window, latent": ("mla_attention", {"window": 40}),
    "rank": ("latent_choose", {"rank": 39}),
    "blocks, latent": ("latent_choose", {"blocks": 6}),
    "layer": ("latent_choose", {"layer": 7}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_detected(name: str) -> None:
    op, changes = DAMAGES[name]
    graph, _ = in_mode(deepseek_v2() if op in ("latent_choose", "mla_attention") else llama(), SPARSE)
    check_graph(graph)
    nodes = [n.with_(attrs={**n.attrs, **changes}) if n.op == op else n for n in graph.nodes]
    with pytest.raises(GraphError, match="softmax is 'fast'" if name == "an unknown softmax" else "do not fit"):
        check_graph(replace(graph, nodes=nodes))


@pytest.mark.parametrize(
    "attrs", [{"window": 0, "sinks": 4}, {"window": 40, "sinks": -1}, {"window": -1}, {"softmax": "eager"}]
)
def test_invalid_windows_are_detected(attrs: dict[str, object]) -> None:
    graph, _ = in_mode(llama(), SLIDING)
    nodes = [n.with_(attrs={**n.attrs, **attrs}) if n.op == "attention" else n for n in graph.nodes]
    with pytest.raises(GraphError, match="do not fit"):
        check_graph(replace(graph, nodes=nodes))


@pytest.mark.parametrize(("config", "op"), [(llama(), "block_choose"), (deepseek_v2(), "latent_choose")])
def test_a_choice_needs_its_inputs(config: object, op: str) -> None:
    """Summaries in the cache, and a cache that is written before it is read."""
    graph, _ = in_mode(config, SPARSE)
    with pytest.raises(GraphError, match="do not fit"):
        check_graph(replace(graph, cache=replace(graph.cache, summaries=False)))
    at = next(i for i, n in enumerate(graph.nodes) if n.op == op)
    write = next(i for i, n in enumerate(graph.nodes[:at]) if n.op in ("rope_cache", "latent_write"))
    if graph.nodes[write].op == "latent_write":
        moved = [*graph.nodes[:write], *graph.nodes[write + 1 : at + 1], graph.nodes[write], *graph.nodes[at + 1 :]]
        with pytest.raises(GraphError, match="before it is written"):
            check_graph(replace(graph, nodes=moved))
    narrow = graph.nodes[at].with_(outputs=(Value("narrow", 31),))
    with pytest.raises(GraphError, match="do not fit"):
        check_graph(replace(graph, nodes=[*graph.nodes[:at], narrow, *graph.nodes[at + 1 :]]))
