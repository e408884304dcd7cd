"""The rest of a graph: from one of its hidden states on, for who changes a late layer only and has the states before it."""

from __future__ import annotations

from dataclasses import replace

from .ir import Graph, Node, Value


def resumed(graph: Graph, index: int) -> Graph:
    """The graph from hidden state `index` on: `inputs_embeds` of a step are that state, in place of the embedding's rows.

    Hidden states are counted from there; the cache keeps the layers it has.

    Args:
        graph: unfused; rules may be applied to the result.
        index: as `hidden_out` counts them. The last one is normed, and only the head comes after it.
    """
    at = next(i for i, n in enumerate(graph.nodes) if n.op == "hidden_out" and n.attrs["index"] == index)
    state = graph.nodes[at].inputs[0]
    embedding = next(n for n in graph.nodes if n.op == "embedding")
    later = [n.with_(attrs={"index": n.attrs["index"] - index}) if n.op == "hidden_out" else n for n in graph.nodes[at:]]
    earlier = _needed(graph.nodes[:at], {value for node in later for value in node.inputs} - {state})
    nodes = [embedding.with_(outputs=(state,)), *earlier, *later]
    return replace(graph, nodes=nodes, hidden_states=graph.hidden_states - index)


def _needed(nodes: list[Node], wanted: set[Value]) -> list[Node]:
    """Those of `nodes` that make the wanted values, or what these are made of (RoPE's table)."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted = wanted.union(node.inputs)
    return kept[::-1]
