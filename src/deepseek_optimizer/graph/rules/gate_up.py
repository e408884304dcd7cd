"""Merges SwiGLU or GeGLU into the projections: gate and up are computed side by side and never stored."""

from __future__ import annotations

from ..ir import Graph, Node
from ..ops.products import GATED, merged_rows
from .edit import Links, rebuilt

_ACTIVATIONS = {op: activation for activation, op in GATED.items()}


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """linear(x) -> gate; linear(x) -> up; swiglu(gate, up) -> h  =>  gate_up(x) -> h; the same for geglu."""
    links, changes, places = Links(graph), dict[int, Node | None](), []
    for at, gated in enumerate(graph.nodes):
        if gated.op not in _ACTIVATIONS:
            continue
        indices = [links.producer(v) for v in gated.inputs]
        gate, up = (graph.nodes[i] for i in indices)
        if any(n.op != "linear" or len(n.weights) != 1 or n.inputs != gate.inputs for n in (gate, up)):
            continue
        if indices[0] == indices[1] or any(links.readers(v) != [at] for v in gated.inputs):
            continue
        biases = (*gate.attrs["biases"], *up.attrs["biases"])
        changes.update(dict.fromkeys(indices))
        attrs = {"biases": biases, "activation": _ACTIVATIONS[gated.op], **merged_rows((gate, up))}
        changes[at] = Node("gate_up", gate.inputs, gated.outputs, (*gate.weights, *up.weights), attrs)
        places.append(gated.outputs[0].name)
    return rebuilt(graph, changes), places
