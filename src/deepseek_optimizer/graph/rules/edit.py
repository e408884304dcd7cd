"""Shared by the rules: finding neighbors in a graph and replacing nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..ir import Graph, Node, Value


class Links:
    """Indices of the nodes that compute and read each value of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        self._producer = {v: i for i, node in enumerate(graph.nodes) for v in node.outputs}
        self._readers: dict[Value, list[int]] = {}
        for i, node in enumerate(graph.nodes):
            for value in dict.fromkeys(node.inputs):
                self._readers.setdefault(value, []).append(i)

    def producer(self, value: Value) -> int:
        """Index of the node that computes `value`."""
        return self._producer[value]

    def readers(self, value: Value) -> list[int]:
        """Indices of the nodes that read `value`, ascending."""
        return self._readers.get(value, [])

    def only_reader(self, value: Value, op: str) -> int | None:
        """Index of the only node that reads `value`, if there is exactly one and it is an `op`."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 and self.nodes[readers[0]].op == op else None

    def source(self, value: Value, through: tuple[str, ...]) -> int:
        """Index of the first node up the chain of first inputs that is not one of the ops `through`."""
        while self.nodes[self.producer(value)].op in through:
            value = self.nodes[self.producer(value)].inputs[0]
        return self.producer(value)


def rebuilt(graph: Graph, changes: Mapping[int, Node | None]) -> Graph:
    """The graph with the nodes at these indices replaced; None removes a node."""
    nodes = [changes.get(i, node) for i, node in enumerate(graph.nodes)]
    return replace(graph, nodes=[node for node in nodes if node is not None])
