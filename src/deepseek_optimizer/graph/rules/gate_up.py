"""Merges SwiGLU into the projections: gate and up are computed side by side and never stored."""

from __future__ import annotations

from ..ir import Graph, Node
from .edit import Links, rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """linear(x) -> gate; linear(x) -> up; swiglu(gate, up) -> h  =>  gate_up(x) -> h."""
    links, changes, places = Links(graph), dict[int, Node | None](), []
    for at, swiglu in enumerate(graph.nodes):
        if swiglu.op != "swiglu":
            continue
        indices = [links.producer(v) for v in swiglu.inputs]
        gate, up = (graph.nodes[i] for i in indices)
        if any(n.op != "linear" or len(n.weights) != 1 or n.inputs != gate.inputs for n in (gate, up)):
            continue
        if indices[0] == indices[1] or any(links.readers(v) != [at] for v in swiglu.inputs):
            continue
        biases = (*gate.attrs["biases"], *up.attrs["biases"])
        changes.update(dict.fromkeys(indices))
        changes[at] = Node("gate_up", gate.inputs, swiglu.outputs, (*gate.weights, *up.weights), {"biases": biases})
        places.append(swiglu.outputs[0].name)
    return rebuilt(graph, changes), places
