"""Graphs whose routed experts the CPU computes: what the device runs, and a graph for the host for each layer of them.

Only rows cross: each token's input and routes to the host, and its result back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ...errors import BackendError
from ...graph.ir import NO_CACHE, Graph, Node, Value


@dataclass(frozen=True)
class HostLayer:
    """The experts of a layer that the host computes.

    Attributes:
        weight: of its `experts_gate_up`, by which the nodes of the device's graph name it.
        width: elements of a row of inputs, and of results.
        graph: reads `states` [T, width + 2 * top_k], the output of `experts_send`. The first `width` elements of the last
            hidden states are the result.
    """

    weight: str
    width: int
    graph: Graph


def divide(graph: Graph, weights: Collection[str]) -> tuple[Graph, tuple[HostLayer, ...]]:
    """Divides a graph between the device and the host.

    The device sends a layer's rows right after its router, and waits for the results where something reads them. Shared experts
    are between the two, so both sides compute at the same time.

    Args:
        graph: the whole graph.
        weights: names of the weights of `experts_gate_up` nodes that the host computes; others than those of the graph are
            ignored.

    Returns: the graph of the device, and what the host computes, in order.

    Raises:
        BackendError: a node with one of these weights has a result that other nodes than `experts_down` read.
    """
    chosen = [node for node in graph.nodes if node.op == "experts_gate_up" and node.weights[0] in weights]
    if not chosen:
        return graph, ()
    downs = {node.outputs[0]: _down(graph, node) for node in chosen}
    layers = tuple(_layer(graph, node, downs[node.outputs[0]]) for node in chosen)
    left_out = [id(node) for node in downs.values()]
    nodes: list[Node] = []
    waiting: Node | None = None  # for the results that the host is computing
    for node in graph.nodes:
        if id(node) in left_out:
            continue
        sends = node.op == "experts_gate_up" and node.outputs[0] in downs
        if waiting is not None and (sends or waiting.outputs[0] in node.inputs):
            nodes.append(waiting)
            waiting = None
        if sends:
            send, waiting = _seam(node, downs[node.outputs[0]])
            nodes.append(send)
        else:
            nodes.append(node)
    if waiting is not None:
        nodes.append(waiting)
    return replace(graph, nodes=nodes), layers


def _down(graph: Graph, gate_up: Node) -> Node:
    """The node that reads the result of a `experts_gate_up`."""
    readers = [node for node in graph.nodes if gate_up.outputs[0] in node.inputs]
    if len(readers) != 1 or readers[0].op != "experts_down":
        name, value = gate_up.weights[0], gate_up.outputs[0].name
        raise BackendError(f"the experts of {name!r} cannot run on the CPU: {len(readers)} nodes read {value!r}")
    return readers[0]


def _seam(gate_up: Node, down: Node) -> tuple[Node, Node]:
    (x, routes), (y,) = gate_up.inputs, down.outputs
    sent, attrs = Value(f"{y.name}.sent", x.width + routes.width), {"weight": gate_up.weights[0]}
    return Node("experts_send", (x, routes), (sent,), attrs=attrs), Node("experts_receive", (sent,), (y,), attrs=attrs)


def _layer(graph: Graph, gate_up: Node, down: Node) -> HostLayer:
    """The result is joined to the routes again, as hidden states are as wide as the states that a graph reads."""
    (x, routes), (y,) = gate_up.inputs, down.outputs
    sent, result = Value(f"{y.name}.sent", x.width + routes.width), Value(f"{y.name}.result", y.width + routes.width)
    nodes = [
        Node("state_in", (), (sent,)),
        Node("columns", (sent,), (x,), attrs={"groups": 1, "begin": 0, "end": x.width}),
        Node("columns", (sent,), (routes,), attrs={"groups": 1, "begin": x.width, "end": sent.width}),
        gate_up,
        down,
        Node("concat", (y, routes), (result,)),
        Node("hidden_out", (result,), attrs={"index": 0}),
    ]
    own = Graph(graph.family, nodes, graph.vocab_size, result.width, 1, NO_CACHE, graph.max_positions)
    return HostLayer(gate_up.weights[0], y.width, own)
