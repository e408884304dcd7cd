"""Groups of layers in the KV cache: layers that attend to every token, and layers with a window.

A block of the cache holds 32 tokens of the layers of one group, so that the blocks of layers with a window can be released
behind it while those of the other layers stay (the design of vLLM's hybrid KV cache manager). All groups share one pool of
blocks of the same size. Layers are therefore distributed over groups of nearly the same number of layers, for example four full
layers and twenty sliding ones over one group and five.
"""

from __future__ import annotations

from dataclasses import replace

from .attention_mode import Span, span_of_all, spans_of_layers
from .ir import CacheSpec, Graph

_MAX_UNUSED = 1 / 16  # of the places for layers in the groups' blocks


def group_layers(graph: Graph) -> Graph:
    """The graph with the layers of its cache in groups. Unchanged if all of its layers attend to every token, or none does, if
    no window is shorter than the context, or if the cache has summaries or latents."""
    cache = graph.cache
    if not isinstance(cache, CacheSpec) or cache.summaries:
        return graph
    spans = spans_of_layers(graph)
    windowed = [
        layer
        for layer in range(cache.layers)
        if (span := spans.get(layer)) is not None and span[0] + span[1] < graph.max_positions
    ]
    full = [layer for layer in range(cache.layers) if layer not in windowed]
    if not windowed or not full:
        return graph
    size = _group_size(len(full), len(windowed))
    groups = [0] * cache.layers
    for place, layer in enumerate(full):
        groups[layer] = place // size
    first = groups[full[-1]] + 1
    for place, layer in enumerate(windowed):
        groups[layer] = first + place // size
    return replace(graph, cache=replace(cache, layer_groups=tuple(groups)))


def group_spans(graph: Graph) -> tuple[Span, ...]:
    """For each group of layers of the cache (window, sinks) such that the tokens between a sequence's first `sinks` and last
    `window` tokens are not visible in any of its layers; None if a layer may attend to every token."""
    cache, spans = graph.cache, spans_of_layers(graph)
    if cache.groups == 1:
        return (span_of_all(list(spans.values())),)
    groups: list[list[Span]] = [[] for _ in range(cache.groups)]
    for layer in range(cache.layers):
        groups[cache.group_of(layer)].append(spans.get(layer))
    return tuple(map(span_of_all, groups))


def _group_size(full: int, windowed: int) -> int:
    """The largest number of layers per group of which few places remain unused."""
    sizes = range(max(full, windowed), 0, -1)
    return next(size for size in sizes if _unused(full, windowed, size) <= _MAX_UNUSED)


def _unused(full: int, windowed: int, size: int) -> float:
    """Fraction of the places for layers, in groups of `size` layers, that have no layer."""
    places = (-(-full // size) + -(-windowed // size)) * size
    return 1 - (full + windowed) / places
