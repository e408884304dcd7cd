"""Facts about a graph that rules and backends need."""

from __future__ import annotations

from .ir import Graph, Value

EFFECTS = ("cache_write", "rope_cache", "lm_head")  # what a step is run for, beside hidden states


def hidden_only(graph: Graph) -> frozenset[int]:
    """Indices of nodes that matter only where hidden states are asked for: `hidden_out` and what feeds nothing else."""
    needed: set[Value] = set()
    only: set[int] = set()
    for i in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[i]
        if node.op in EFFECTS or needed.intersection(node.outputs):
            needed.update(node.inputs)
        else:
            only.add(i)
    return frozenset(only)
