"""Groups of layers in the KV cache: layers that attend to every token, and layers with a window.

A block of the cache holds 32 tokens of the layers of one group, so that the blocks of layers with a window can be released
behind it while those of the other layers stay (the design of vLLM's hybrid KV cache manager). All groups share one pool of
blocks of the same size. Layers are therefore distributed over groups of nearly the same size, for example four full layers and
twenty sliding ones over one group and five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

from .attention_mode import Span, span_of_all, spans_of_layers
from .ir import CacheSpec, Graph

_MAX_UNUSED = 1 / 16  # of the groups' blocks


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
    sizes = [kv_heads * head_dim for kv_heads, head_dim in cache.heads]
    groups = _groups([[sizes[layer] for layer in kind] for kind in (full, windowed)])
    of_layer = dict(zip((*full, *windowed), groups, strict=True))
    return replace(graph, cache=replace(cache, layer_groups=tuple(of_layer[layer] for layer in range(cache.layers))))


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


def _groups(kinds: Sequence[Sequence[int]]) -> list[int]:
    """The group of each layer: the largest groups whose blocks are nearly full, or those that leave the least unused.

    Args:
        kinds: for each kind of layers, the sizes of their keys. Layers of different kinds are in different groups.
    """
    capacities = {total for sizes in kinds for total in accumulate(sizes)} | {max(size for sizes in kinds for size in sizes)}
    choices = [_filled(kinds, capacity) for capacity in sorted(capacities, reverse=True)]
    unused = [_unused(kinds, groups) for groups in choices]
    return choices[next((i for i, share in enumerate(unused) if share <= _MAX_UNUSED), unused.index(min(unused)))]


def _filled(kinds: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """The group of each layer if groups take layers in order, up to `capacity`; a larger layer is a group by itself."""
    groups: list[int] = []
    for sizes in kinds:
        group, room = max(groups, default=-1) + 1, capacity
        for i, size in enumerate(sizes):
            if size > room and i:
                group, room = group + 1, capacity
            groups.append(group)
            room -= size
    return groups


def _unused(kinds: Sequence[Sequence[int]], groups: Sequence[int]) -> float:
    """The share of the groups' blocks that holds nothing; a block has the size of the largest group."""
    totals = [0] * (max(groups) + 1)
    for group, size in zip(groups, chain(*kinds), strict=True):
        totals[group] += size
    return 1 - sum(totals) / (len(totals) * max(totals))
