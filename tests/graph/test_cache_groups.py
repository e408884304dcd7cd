"""The groups of layers in the KV cache."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode, forgetting
from deepseek_optimizer.graph.cache_groups import group_layers, group_spans
from deepseek_optimizer.graph.ir import CacheSpec
from deepseek_optimizer.models import build_graph
from support.family_configs import gemma2, gemma3_text, mistral, qwen2
from support.models import CASES


def kinds(layers: str) -> list[str]:
    return [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in layers]


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("sfsf", (1, 0, 1, 0)),
        ("sssssf" * 2, (1, 1, 2, 2, 3, 0, 3, 4, 4, 5, 5, 0)),  # two layers per group
        ("ssf", (1, 2, 0)),
        ("sf" + "s" * 15, (1, 0, *range(2, 17))),
        ("sssssf" * 5 + "ssss", tuple(0 if n % 6 == 5 else 1 + (n - n // 6) // 5 for n in range(34))),  # Gemma 3 4B
        ("f" * 8 + "s" * 9, (0,) * 8 + (1,) * 9),
        ("f" * 8 + "s" * 12, (0,) * 4 + (1,) * 4 + (2,) * 4 + (3,) * 4 + (4,) * 4),  # not 8: a group would be half empty
    ],
)
def test_layers_are_distributed(layers: str, groups: tuple[int, ...]) -> None:
    config = gemma2(num_hidden_layers=len(layers), layer_types=kinds(layers), sliding_window=37)
    graph = group_layers(build_graph(config))
    assert graph.cache.layer_groups == groups
    for layer, kind in enumerate(layers):
        assert group_spans(graph)[graph.cache.group_of(layer)] == (None if kind == "f" else (37, 0))


@pytest.mark.parametrize(
    ("heads", "groups"),
    [
        ([(16, 256)] * 5 + [(4, 512)], (1, 2, 3, 4, 5, 0)),  # one in 12 remains unused, less than with larger blocks
        (([(4, 64)] * 5 + [(1, 512)]) * 2, (2, 2, 3, 3, 4, 0, 4, 5, 5, 6, 6, 1)),
        (([(2, 64)] * 3 + [(1, 100)]) * 2, (1, 1, 2, 0, 2, 3, 3, 0)),
    ],
)
def test_layers_of_different_sizes(heads: list[tuple[int, int]], groups: tuple[int, ...]) -> None:
    """Full layers, the last of each period, have other heads than those with a window."""
    layers = len(heads)
    period = layers // 2 if layers > 6 else layers
    types = kinds(("s" * (period - 1) + "f") * (layers // period))
    graph = build_graph(gemma2(num_hidden_layers=layers, layer_types=types, sliding_window=37))
    kv_heads, head_dim = (tuple(size) for size in zip(*heads, strict=True))
    graph = group_layers(replace(graph, cache=CacheSpec(layers, kv_heads, head_dim)))
    assert graph.cache.layer_groups == groups


@pytest.mark.parametrize("case", sorted(case for case in CASES if not case.startswith("deepseek_v4")))
def test_every_family(case: str) -> None:
    """Full and windowed layers are never in one group, and only graphs with both are grouped. V4: test_compressed.py."""
    plain = build_graph(CASES[case]())
    graph = group_layers(plain)
    windows = {node.attrs["layer"]: node.attrs["window"] for node in plain.nodes if node.op == "attention"}
    mixed = len({bool(window) for window in windows.values()}) > 1
    assert (graph.cache.groups > 1) == mixed and len(group_spans(graph)) == graph.cache.groups
    for layer, window in windows.items():
        if mixed:
            assert (group_spans(graph)[graph.cache.group_of(layer)] is None) == (window == 0)
    if not mixed:
        assert graph is plain and group_spans(graph) == (forgetting(plain),)
    else:
        assert group_spans(graph)[0] is None and forgetting(graph) is None


def test_what_is_not_grouped() -> None:
    window = build_graph(mistral(sliding_window=37))
    assert group_layers(window) is window
    long = build_graph(gemma3_text(sliding_window=4096))  # not shorter than the context
    assert group_layers(long) is long
    mixed = build_graph(gemma3_text())
    sparse, _ = apply_mode(mixed, AttentionMode("sparse", window=32, sinks=4, budget=192))
    assert group_layers(sparse) is sparse
    sliding, _ = apply_mode(mixed, AttentionMode("sliding", window=64, sinks=4))
    assert group_layers(sliding) is sliding and group_spans(sliding) == ((64, 4),)
    assert group_layers(build_graph(qwen2())).cache.layer_groups == ()
