"""Groups tokens by expert, so that a step reads the weights of a chosen expert only once."""

from __future__ import annotations

from ..ir import Graph, Node
from .edit import Links, rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """experts_gate_up and the experts_down that reads it: grouped=False  =>  grouped=True."""
    links, changes, places = Links(graph), dict[int, Node | None](), []
    for at, first in enumerate(graph.nodes):
        if first.op != "experts_gate_up" or first.attrs["grouped"]:
            continue
        then = links.only_reader(first.outputs[0], "experts_down")
        if then is None or graph.nodes[then].inputs[1] != first.inputs[1]:
            continue
        for i in (at, then):
            changes[i] = graph.nodes[i].with_(attrs={**graph.nodes[i].attrs, "grouped": True})
        places.append(first.outputs[0].name)
    return rebuilt(graph, changes), places
