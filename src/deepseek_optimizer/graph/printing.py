"""Text form of a graph, one node per line, for people and for tests."""

from __future__ import annotations

from typing import Any

from .ir import Graph, Node, Value


def to_text(graph: Graph) -> str:
    """The graph as text, one line per node.

    For example `l0.q[T,576] = linear(l0.attn_in) model.layers.0.self_attn.q_proj.weight biases=(None,)`.
    """
    head = f"graph {graph.family}: {len(graph.nodes)} nodes, {graph.cache.layers} layers, vocabulary {graph.vocab_size}"
    return "\n".join([head, *(f"{i:4d}  {node_text(node)}" for i, node in enumerate(graph.nodes))])


def node_text(node: Node) -> str:
    """One node as text."""
    outputs = ", ".join(_value_text(v) for v in node.outputs)
    call = f"{node.op}({', '.join(v.name for v in node.inputs)})"
    attrs = (f"{name}={_attr_text(value)}" for name, value in sorted(node.attrs.items()))
    return " ".join([f"{outputs} = {call}" if outputs else call, *node.weights, *attrs])


def _value_text(value: Value) -> str:
    kind = "" if value.kind == "f32" else f":{value.kind}"
    rows = ("R" if value.selected else "T") + (f"*{value.repeat}" if value.repeat > 1 else "")
    return f"{value.name}[{rows},{value.width}]{kind}"


def _attr_text(value: Any) -> str:
    if hasattr(value, "inv_freq"):  # RopeSpec: its kind and width say enough
        return f"{value.kind}/{value.rot}"
    return f"{value:g}" if isinstance(value, float) else str(value)
