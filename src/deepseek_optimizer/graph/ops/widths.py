"""Checks of widths that several ops share. Each takes a node whose operands and attributes have been counted and typed."""

from __future__ import annotations

from ..ir import BLOCK, CacheSpec, Graph, LatentSpec, Node


def same_widths(node: Node, _: Graph) -> bool:
    """All inputs and outputs have one width."""
    return len({v.width for v in (*node.inputs, *node.outputs)}) == 1


def heads_width(node: Node, count: str) -> int:
    """Width of `count` ("heads" or "kv_heads") heads of `head_dim` elements."""
    return int(node.attrs[count] * node.attrs["head_dim"])


def fits_cache(node: Node, graph: Graph) -> bool:
    """The graph has a cache of keys and values, and the node's layer lies in it and has this shape."""
    a, spec = node.attrs, graph.cache
    if not isinstance(spec, CacheSpec):
        return False
    return 0 <= a["layer"] < spec.layers and (a["kv_heads"], a["head_dim"]) == spec.heads_of(a["layer"])


def latent_cache(node: Node, graph: Graph) -> LatentSpec | None:
    """The spec of the latent cache, if the graph has one and the node's layer lies in it."""
    spec = graph.cache
    return spec if isinstance(spec, LatentSpec) and 0 <= node.attrs["layer"] < spec.layers else None


def fits_latent_cache(node: Node, graph: Graph) -> bool:
    """The graph has a latent cache of the node's `rank` and `rope`, and the node's layer lies in it."""
    spec = latent_cache(node, graph)
    return spec is not None and (node.attrs["rank"], node.attrs["rope"]) == (spec.rank, spec.rope)


def fits_span(node: Node) -> bool:
    """Visible tokens are limited by a window with sinks or by a choice (the last input), not by both."""
    window, sinks = node.attrs.get("window", 0), node.attrs.get("sinks", 0)
    return bool(window >= 0 and sinks >= 0 and (window > 0 or not sinks) and not (window and len(node.inputs) > 1))


def fits_choice(node: Node, graph: Graph) -> bool:
    """Sinks and window leave at least one of `blocks` blocks to choose, and the cache keeps the summaries to choose by."""
    a = node.attrs
    always = -(-a["sinks"] // BLOCK) + -(-a["window"] // BLOCK) + 1
    return bool(a["sinks"] >= 0 and a["window"] >= 1 and always < a["blocks"] and graph.cache.summaries)
