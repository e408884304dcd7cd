"""Facts about a graph that rules and backends need."""

from __future__ import annotations

from ..errors import GraphError
from .ir import Graph, Node, Value

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


def weight_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Every weight's name -> the shape the graph needs: what a checkpoint can be checked against before memory is taken."""
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        for name, shape in _shapes(node, graph):
            if shapes.setdefault(name, shape) != shape:
                raise GraphError(f"{name!r} is used as {shapes[name]} and as {shape}")
    return shapes


def _shapes(node: Node, graph: Graph) -> list[tuple[str, tuple[int, ...]]]:
    if node.op == "embedding":
        return [(node.weights[0], (graph.vocab_size, graph.hidden_size))]
    if node.op == "head_norm":
        return [(node.weights[0], (node.attrs["head_dim"],))]
    if node.op in ("rms_norm", "add_rms_norm"):
        return [(node.weights[0], (node.inputs[0].width,))]
    biases = node.attrs["biases"] if "biases" in node.attrs else (node.attrs.get("bias"),)
    outputs = node.outputs * (len(node.weights) // max(1, len(node.outputs)))  # gate_up: two matrices, one output
    matrices = [(name, (out.width, node.inputs[0].width)) for name, out in zip(node.weights, outputs, strict=True)]
    return [*matrices, *((name, (out.width,)) for name, out in zip(biases, outputs, strict=False) if name is not None)]
