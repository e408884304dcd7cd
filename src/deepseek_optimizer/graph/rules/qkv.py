"""One projection for q, k and v: their input is read (and quantised) once, and one step has all their rows to share out."""

from __future__ import annotations

from ..ir import Graph, Node
from .edit import Links, rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """linear(x) -> q; linear(x) -> k; linear(x) -> v  =>  linear(x) -> q, k, v, for each attention of one input."""
    links, changes, places = Links(graph), dict[int, Node | None](), []
    writes = {n.attrs["layer"]: n for n in graph.nodes if n.op == "cache_write"}
    for attention in (n for n in graph.nodes if n.op == "attention"):
        write = writes.get(attention.attrs["layer"])
        if write is None:  # rope_cache came first
            continue
        indices = [links.source(v, ("rope", "head_norm")) for v in (attention.inputs[0], *write.inputs)]
        parts = [graph.nodes[i] for i in indices]
        if len(set(indices)) != 3 or any(p.op != "linear" or len(p.weights) != 1 or p.inputs != parts[0].inputs for p in parts):
            continue
        merged = Node(
            "linear", parts[0].inputs, tuple(p.outputs[0] for p in parts), tuple(p.weights[0] for p in parts),
            {"biases": tuple(p.attrs["biases"][0] for p in parts)},
        )  # fmt: skip
        changes.update(dict.fromkeys(indices))
        changes[min(indices)] = merged
        places.append(f"layer {attention.attrs['layer']}")
    return rebuilt(graph, changes), places
