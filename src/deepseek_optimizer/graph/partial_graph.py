"""The rest of a graph from one of its hidden states on, to recompute late layers from stored states of earlier ones."""

from __future__ import annotations

from dataclasses import replace

from .ir import Graph, Node, Value


def graph_from_hidden_state(graph: Graph, index: int) -> Graph:
    """The graph from hidden state `index` on, which is passed as `inputs_embeds`.

    Hidden states are renumbered from there on; the cache keeps all its layers.

    Args:
        graph: unfused; rules may be applied to the result.
        index: as in `hidden_out`. The last one is normalised already, and only the head follows.
    """
    at, state, earlier = _split(graph, index)
    embedding = next(n for n in graph.nodes if n.op == "embedding")
    later = [n.with_(attrs={"index": n.attrs["index"] - index}) if n.op == "hidden_out" else n for n in graph.nodes[at:]]
    nodes = [embedding.with_(outputs=(state,)), *earlier, *later]
    return replace(graph, nodes=nodes, hidden_states=graph.hidden_states - index)


def latest_restart(graph: Graph, index: int) -> int:
    """The index of the latest hidden state up to `index` from which the rest of the graph can be computed. Where layers share
    the tokens that an earlier layer chose, it is the input of that layer."""
    while any(node.op == "embedding" for node in _split(graph, index)[2]):
        index -= 1
    return index


def _split(graph: Graph, index: int) -> tuple[int, Value, list[Node]]:
    """Where the graph continues from hidden state `index`, the state, and the earlier nodes whose other results are needed."""
    at = next(i for i, n in enumerate(graph.nodes) if n.op == "hidden_out" and n.attrs["index"] == index)
    state = graph.nodes[at].inputs[0]
    read = {value for node in graph.nodes[at:] for value in node.inputs} - {state}
    return at, state, _needed(graph.nodes[:at], read)


def _needed(nodes: list[Node], wanted: set[Value]) -> list[Node]:
    """Those of `nodes` that the wanted values depend on (such as RoPE's table)."""
    needed = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            needed.append(node)
            wanted = wanted.union(node.inputs)
    return needed[::-1]
