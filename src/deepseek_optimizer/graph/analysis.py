"""Facts about a graph that rules and backends need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import GraphError
from .ir import Graph, Node, Value

# What a step is run for, beside hidden states.
EFFECTS = ("cache_write", "rope_cache", "latent_write", "index_write", "lm_head")

Shapes = list[tuple[str, tuple[int, ...]]]


def hidden_only(graph: Graph, wanted: Collection[int] = ()) -> frozenset[int]:
    """Indices of nodes that matter only where hidden states are asked for: `hidden_out` and what feeds nothing else.

    Args:
        wanted: indices of hidden states that count as results; what they need is not among the nodes returned. Of a graph
            without a head the last one always counts: it is what its steps are run for.
    """
    if not graph.has_head:
        wanted = {*wanted, graph.hidden_states - 1}
    needed: set[Value] = set()
    only: set[int] = set()
    for i in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[i]
        asked = node.op == "hidden_out" and node.attrs["index"] in wanted
        if asked or node.op in EFFECTS or needed.intersection(node.outputs):
            needed.update(node.inputs)
        else:
            only.add(i)
    return frozenset(only)


def weight_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Every weight's name -> the shape the graph needs: what a checkpoint can be checked against before memory is taken.

    Shapes are those of Transformers' parameters; a stack of matrices has three axes there, see `stack_shapes`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        for name, shape in _SHAPES.get(node.op, _matrices)(node, graph):
            if shapes.setdefault(name, shape) != shape:
                raise GraphError(f"{name!r} is used as {shapes[name]} and as {shape}")
    return shapes


def stack_shapes(graph: Graph) -> dict[str, tuple[int, int, int]]:
    """Name of every weight that is a stack of matrices -> (count, rows, cols) of the `PackedStack` that backends take.

    A gate_up parameter [E, 2 I, H] is a stack of 2 E matrices [I, H]; a down parameter [E, H, I] one of E.
    """
    stacks = {}
    for node in graph.nodes:
        for name, (count, rows, cols) in _experts(node, graph) if node.op in ("experts_gate_up", "experts_down") else ():
            halves = 2 if node.op == "experts_gate_up" else 1
            stacks[name] = (halves * count, rows // halves, cols)
    return stacks


def _vector(node: Node, _: Graph) -> Shapes:
    return [(name, (node.inputs[0].width,)) for name in node.weights]


def _experts(node: Node, _: Graph) -> Shapes:
    experts, x, y = node.attrs["experts"], node.inputs[0].width, node.outputs[0].width
    return [(node.weights[0], (experts, 2 * y if node.op == "experts_gate_up" else y, x))]


def _router(node: Node, _: Graph) -> Shapes:
    experts, bias = node.attrs["experts"], node.attrs["bias"]
    return [(node.weights[0], (experts, node.inputs[0].width)), *([(bias, (experts,))] if bias is not None else [])]


def _mla(node: Node, _: Graph) -> Shapes:
    a = node.attrs
    return [(node.weights[0], (a["heads"] * (a["nope"] + a["v_dim"]), a["rank"]))]


def _matrices(node: Node, _: Graph) -> Shapes:
    biases = node.attrs["biases"] if "biases" in node.attrs else (node.attrs.get("bias"),)
    outputs = node.outputs * (len(node.weights) // max(1, len(node.outputs)))  # gate_up: two matrices, one output
    matrices = [(name, (out.width, node.inputs[0].width)) for name, out in zip(node.weights, outputs, strict=True)]
    return [*matrices, *((name, (out.width,)) for name, out in zip(biases, outputs, strict=False) if name is not None)]


_SHAPES: Mapping[str, Callable[[Node, Graph], Shapes]] = {
    "embedding": lambda n, g: [(n.weights[0], (g.vocab_size, g.hidden_size))],
    "head_norm": lambda n, g: [(n.weights[0], (n.attrs["head_dim"],))],
    "rms_norm": _vector,
    "add_rms_norm": _vector,
    "layer_norm": _vector,
    "latent": lambda n, g: [(n.weights[0], (n.attrs["rank"],))],
    "mla_attention": _mla,
    "latent_choose": _mla,
    "router": _router,
    "experts_gate_up": _experts,
    "experts_down": _experts,
}


def dynamic_rope(graph: Graph) -> Any:
    """The `models.rope.RopeSpec` whose frequencies each sequence has for itself; None where all have the same.

    Raises: GraphError where there are other tables beside it: a step brings one set of frequencies a sequence.
    """
    tables = [node.attrs["rope"] for node in graph.nodes if node.op == "rope_table"]
    if not any(rope.is_dynamic for rope in tables):
        return None
    if len(tables) > 1:
        raise GraphError(f"a graph with dynamic RoPE has one table of it, and this one has {len(tables)}")
    return tables[0]
