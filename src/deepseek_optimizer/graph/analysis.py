"""Facts about a graph that rules and backends need."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..errors import GraphError
from .ir import Graph, Value
from .ops import spec_of


def hidden_only(graph: Graph, wanted: Collection[int] = ()) -> frozenset[int]:
    """Indices of nodes that a step needs only if hidden states are requested: `hidden_out`, and nodes that feed nothing else.

    Args:
        graph: the graph.
        wanted: indices of hidden states that are results, so that the nodes they depend on are not returned. The last hidden
            state of a graph without a head always is one.
    """
    if not graph.has_head:
        wanted = {*wanted, graph.hidden_states - 1}
    needed: set[Value] = set()
    only: set[int] = set()
    for i in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[i]
        requested = node.op == "hidden_out" and node.attrs["index"] in wanted
        if requested or spec_of(node).has_effect or needed.intersection(node.outputs):
            needed.update(node.inputs)
        else:
            only.add(i)
    return frozenset(only)


def weight_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name, used to check checkpoints before memory is allocated.

    Shapes are those of Transformers' parameters, where a stack of matrices has three axes; see `stack_shapes`.

    Raises:
        GraphError: nodes use a weight with different shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        for name, shape in spec_of(node).weight_shapes(node, graph):
            if shapes.setdefault(name, shape) != shape:
                raise GraphError(f"{name!r} is used as {shapes[name]} and as {shape}")
    return shapes


def stack_shapes(graph: Graph) -> dict[str, tuple[int, int, int]]:
    """(count, rows, cols) of the `PackedStack` that backends expect, for every weight that is a stack of matrices, by name.

    A gate_up parameter [E, 2 I, H] is a stack of 2 E matrices [I, H]; a down parameter [E, H, I] one of E. The same holds for
    parameters that Transformers stores transposed.
    """
    stacks = {}
    for node in graph.nodes:
        spec = spec_of(node)
        if spec.stacked:
            name, (experts, rows, cols) = spec.weight_shapes(node, graph)[0]
            rows, cols = (cols, rows) if node.attrs.get("layout", "rows") != "rows" else (rows, cols)
            stacks[name] = (spec.stacked * experts, rows // spec.stacked, cols)
    return stacks


def dynamic_rope(graph: Graph) -> Any:
    """The `models.rope.RopeSpec` whose frequencies depend on the sequence; None if all sequences share them.

    Raises:
        GraphError: the graph has further RoPE tables; a step has one set of frequencies per sequence.
    """
    tables = [node.attrs["rope"] for node in graph.nodes if node.op == "rope_table"]
    if not any(rope.is_dynamic for rope in tables):
        return None
    if len(tables) > 1:
        raise GraphError(f"a graph with dynamic RoPE must have one RoPE table, but this one has {len(tables)}")
    return tables[0]
