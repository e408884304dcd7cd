"""Merges RoPE of q and k with the cache write: rotated keys are written directly to their block."""

from __future__ import annotations

from ..ir import Graph, Node
from .edit import Links, rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """rope(q) -> q'; rope(k) -> k'; cache_write(k', v); attention(q')  =>  rope_cache(q, k, v, table) -> q'; attention(q')."""
    links, changes, places = Links(graph), dict[int, Node | None](), []
    attentions: dict[int, Node] = {}  # the first over each layer of the cache; others only read it
    for node in graph.nodes:
        if node.op == "attention":
            attentions.setdefault(node.attrs["layer"], node)
    for at, write in enumerate(graph.nodes):
        if write.op != "cache_write" or write.attrs["layer"] not in attentions:
            continue
        q_rope = links.source(attentions[write.attrs["layer"]].inputs[0], ("position_scale",))
        k_rope = links.producer(write.inputs[0])
        q, k = graph.nodes[q_rope], graph.nodes[k_rope]
        if q.op != "rope" or k.op != "rope" or q.inputs[1] != k.inputs[1] or q.attrs["interleaved"] != k.attrs["interleaved"]:
            continue
        if links.only_reader(k.outputs[0], "cache_write") is None or min(links.readers(q.outputs[0])) < at:
            continue
        changes.update({q_rope: None, k_rope: None})
        inputs = (q.inputs[0], k.inputs[0], write.inputs[1], q.inputs[1])
        attrs = {**write.attrs, "heads": q.attrs["heads"], "interleaved": q.attrs["interleaved"]}
        changes[at] = Node("rope_cache", inputs, q.outputs, attrs=attrs)
        places.append(f"layer {write.attrs['layer']}")
    return rebuilt(graph, changes), places
