"""Groups of layers in the KV cache: layers that attend to every token, and layers with a window.

A block of the cache holds 32 tokens of the layers of one group, so that the blocks of layers with a window can be released
behind it while those of the other layers stay. All groups share one pool of blocks of the same size (as in vLLM's hybrid KV
cache manager, docs.vllm.ai). Layers are therefore distributed over groups of nearly the same size, for example four full layers
and twenty sliding ones over one group and five.

The rows of compressed attention are in groups in the same way, by their windows.

Copies of the newest tokens, in int8, are layers with a short window: they are in groups of their own, each with half as many
layers as one of int4 layers.
"""

from __future__ import annotations

from dataclasses import replace

from .attention_mode import Span, span_of_all, spans_of_layers
from .ir import CacheSpec, Graph, RowsSpec

NEWEST = 128  # tokens of each sequence that attention reads in int8 if the cache is int4
_TABLE = 0.005  # cost of one more block table per sequence, as a fraction of the cache's memory


def group_layers(graph: Graph) -> Graph:
    """The graph with the layers of its cache in groups. Unchanged if all of its layers attend to every token, or none does, if
    no window is shorter than the context, or if the cache has summaries or latents."""
    cache = graph.cache
    if isinstance(cache, RowsSpec):
        return replace(graph, cache=_group_rows(cache, graph.max_positions))
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
    packed = _packed([[(layer, cache.elements_of(layer)) for layer in kind] for kind in (full, windowed)])
    groups = [0] * cache.layers
    for group, layers in enumerate(packed):
        for layer in layers:
            groups[layer] = group
    return replace(graph, cache=replace(cache, layer_groups=tuple(groups)))


def cached_in(graph: Graph, kv_dtype: str) -> Graph:
    """The graph for a cache of this dtype: with `group_layers` and, if keys and values are int4, copies of the newest tokens.
    Caches with summaries have no copies, and neither do latents, which lose little in int4."""
    graph = group_layers(graph)
    cache = graph.cache
    if kv_dtype != "int4" or not isinstance(cache, CacheSpec) or cache.summaries or not cache.layers:
        return graph
    sizes = [0] * cache.groups
    for layer in range(cache.layers):
        sizes[cache.group_of(layer)] += cache.elements_of(layer)
    layers = [(layer, cache.elements_of(layer)) for layer in range(cache.layers)]
    copies = _filled(layers, max(max(sizes) // 2, *(elements for _, elements in layers)))
    groups = [cache.groups + n for n, group in enumerate(copies) for _ in group]
    return replace(graph, cache=replace(cache, newest=NEWEST, newest_groups=tuple(groups)))


def group_spans(graph: Graph) -> tuple[Span, ...]:
    """For each group of layers of the cache (window, sinks) such that the tokens between a sequence's first `sinks` and last
    `window` tokens are not visible in any of its layers; None if a layer may attend to every token."""
    cache = graph.cache
    if isinstance(cache, RowsSpec):
        kinds: list[list[Span]] = [[] for _ in range(cache.groups)]
        for layer, rows in enumerate(cache.rows):
            kinds[cache.group_of(layer)].append((rows.window, 0) if rows.window else None)
        return tuple(map(span_of_all, kinds))
    spans = spans_of_layers(graph)
    if cache.groups == 1:
        return (span_of_all(list(spans.values())),)
    copies = [(cache.newest, 0)] * (cache.groups - cache.own_groups)
    groups: list[list[Span]] = [[] for _ in range(cache.own_groups)]
    for layer in range(cache.layers):
        groups[cache.group_of(layer)].append(spans.get(layer))
    return (*map(span_of_all, groups), *copies)


def _group_rows(cache: RowsSpec, max_positions: int) -> RowsSpec:
    """Kinds of rows in groups by their windows: those with the same window are read, and released, together. All kinds without
    a window are in one group, which grows with the text, so a block is no larger than that needs, if every kind fits in it."""
    windows = [rows.window if rows.window < max_positions else 0 for rows in cache.rows]
    sizes = [rows.places * rows.width for rows in cache.rows]
    kinds = [[(i, sizes[i]) for i, own in enumerate(windows) if own == window] for window in sorted(set(windows))]
    if len(kinds) == 1:
        return cache
    growing = sum(size for size, window in zip(sizes, windows, strict=True) if not window)
    size = max(growing, *sizes)
    packed = [group for kind in kinds for group in _filled(kind, size)] if growing else _packed(kinds)
    groups = [0] * cache.layers
    for group, members in enumerate(packed):
        for i in members:
            groups[i] = group
    return replace(cache, row_groups=tuple(groups))


def _packed(kinds: list[list[tuple[int, int]]]) -> list[list[int]]:
    """Groups of layers of one kind each: few of them, with little unused in their blocks, which are all of the same size.

    Args:
        kinds: for each kind of layers (layer, elements of a token).
    """
    layers = [elements for kind in kinds for _, elements in kind]
    sizes = {sum(elements for _, elements in kind[:count]) for kind in kinds for count in range(1, len(kind) + 1)}
    best: list[list[int]] = []
    least = float("inf")
    for size in sorted((size for size in sizes if size >= max(layers)), reverse=True):
        groups = [group for kind in kinds for group in _filled(kind, size)]
        cost = 1 - sum(layers) / (len(groups) * size) + _TABLE * len(groups)
        if cost < least:
            best, least = groups, cost
    return best


def _filled(kind: list[tuple[int, int]], size: int) -> list[list[int]]:
    """Consecutive layers in groups of at most `size` elements."""
    groups: list[list[int]] = []
    room = 0
    for layer, elements in kind:
        if elements > room:
            groups.append([])
            room = size
        groups[-1].append(layer)
        room -= elements
    return groups
