"""Merges a residual add and the norm that follows it into one pass, within a layer and across layers.

A backend that quantizes rows does so in the same pass: the norm's result is written in the format that its reader needs.
"""

from __future__ import annotations

from ..analysis import hidden_only
from ..ir import Graph, Node
from .edit import Links, rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """add(x, delta) -> z; rms_norm(z) -> y  =>  add_rms_norm(x, delta) -> z, y.

    A norm that only hidden states need is not merged, so that steps that do not request them can skip it.
    """
    links, changes, places = Links(graph), dict[int, Node | None](), []
    unwanted = hidden_only(graph)
    for at, add in enumerate(graph.nodes):
        if add.op != "add":
            continue
        norms = [i for i in links.readers(add.outputs[0]) if graph.nodes[i].op == "rms_norm" and i not in unwanted]
        if not norms:
            continue
        norm = graph.nodes[norms[0]]
        changes[at] = Node("add_rms_norm", add.inputs, (*add.outputs, *norm.outputs), norm.weights, dict(norm.attrs))
        changes[norms[0]] = None
        places.append(norm.outputs[0].name)
    return rebuilt(graph, changes), places
