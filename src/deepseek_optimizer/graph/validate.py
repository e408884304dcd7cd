"""Checks that a graph is well formed: existing ops with the operands and attributes that their specs require, values computed
before they are read, the cache written before it is read.

Used by the tests of families and rules, and by the reference backend before it compiles.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import GraphError
from .ir import Graph, Node, Value
from .ops import OPS, OpSpec
from .ops.spec import REQUIRED, Operand
from .printing import node_text


def check_graph(graph: Graph) -> None:
    """Raises GraphError, with the node's text, for the first defect."""
    computed: dict[str, Value] = {}
    written: set[tuple[str, int]] = {("cache", layer) for layer in graph.written}
    for node in graph.nodes:
        spec = _known(node)
        _check_operands(node, spec)
        _check_attributes(node, spec)
        if not spec.fits(node, graph):
            raise _error(node, f"widths {[v.width for v in (*node.inputs, *node.outputs)]} do not fit")
        _check_rows(node, spec)
        for value in node.inputs:
            if computed.get(value.name) != value:
                raise _error(node, f"reads {value.name!r}, which no earlier node computes in this form")
        _check_order(node, spec, written)
        for value in node.outputs:
            if value.name in computed:
                raise _error(node, f"computes {value.name!r} a second time")
            computed[value.name] = value
    _check_results(graph)


def _known(node: Node) -> OpSpec:
    spec = OPS.get(node.op)
    if spec is None or spec.origin == "lowering":
        known = (name for name, spec in OPS.items() if spec.origin != "lowering")
        raise _error(node, f"no such op; known: {', '.join(known)}")
    return spec


def _check_operands(node: Node, spec: OpSpec) -> None:
    for what, given, operands in (
        ("inputs", len(node.inputs), spec.inputs),
        ("outputs", len(node.outputs), spec.outputs),
        ("weights", len(node.weights), spec.weights),
    ):
        minimum, text = _count(operands)
        if given < minimum or (given > len(operands) and not any(o.many for o in operands)):
            raise _error(node, f"has {given} {what}, needs {text}")


def _count(operands: Sequence[Operand]) -> tuple[int, str]:
    """The minimum number of operands, and the allowed numbers as text."""
    minimum = sum(not o.optional for o in operands)
    if any(o.many for o in operands):
        return minimum, f"{minimum} or more"
    return minimum, " or ".join(map(str, range(minimum, len(operands) + 1)))


def _check_attributes(node: Node, spec: OpSpec) -> None:
    missing = [attr.name for attr in spec.attrs if attr.default is REQUIRED and attr.name not in node.attrs]
    if missing:
        raise _error(node, f"lacks {', '.join(missing)}")
    unknown = sorted(node.attrs.keys() - {attr.name for attr in spec.attrs})
    if unknown:
        raise _error(node, f"has no attribute {', '.join(unknown)}; known: {', '.join(a.name for a in spec.attrs) or 'none'}")
    for attr in spec.attrs:
        if attr.name in node.attrs and not attr.type.accepts(node.attrs[attr.name]):
            raise _error(node, f"{attr.name} is {node.attrs[attr.name]!r}, needs {attr.type.text}")


def _check_rows(node: Node, spec: OpSpec) -> None:
    """Rows are the tokens before `select_rows` and the selected rows after it; only experts have several per token."""
    inputs, outputs = ({v.selected for v in values} for values in (node.inputs, node.outputs))
    if spec.rows == "select":
        fits = inputs == {False} and outputs == {True}
    else:
        fits = len(inputs | outputs) <= 1 and not (spec.rows == "tokens" and True in inputs | outputs)
    if not fits:
        raise _error(node, "mixes token rows and selected rows")
    for values, repeated in ((node.inputs, spec.repeated_inputs), (node.outputs, spec.repeated_outputs)):
        if any(v.repeat != 1 for i, v in enumerate(values) if i not in repeated):
            raise _error(node, "has values with several rows per token")


def _check_order(node: Node, spec: OpSpec, written: set[tuple[str, int]]) -> None:
    """Checks that a layer's part of the cache is written once, before it is read. Adds the parts that the node writes to
    `written`."""
    if spec.reads is not None:
        layers = [node.attrs[name] for name in spec.read_layers]
        if any(layer >= 0 and (spec.reads, layer) not in written for layer in layers):
            raise _error(node, f"reads the {spec.reads} of a layer before it is written")
    if spec.writes is not None:
        place = (spec.writes, node.attrs["layer"])
        if place in written:
            raise _error(node, f"writes the {spec.writes} of a layer a second time")
        written.add(place)


def _check_results(graph: Graph) -> None:
    heads = [n for n in graph.nodes if n.op == "lm_head"]
    if len(heads) > 1:
        raise GraphError(f"a graph must have at most one lm_head, but this one has {len(heads)}")
    if sum(n.op == "draft_out" for n in graph.nodes) > 1:
        raise GraphError("a graph must have at most one draft_out")
    indices = sorted(n.attrs["index"] for n in graph.nodes if n.op == "hidden_out")
    if indices != list(range(graph.hidden_states)):
        raise GraphError(f"hidden_out needs indices 0 to {graph.hidden_states - 1}, each once; has {indices}")


def _error(node: Node, message: str) -> GraphError:
    return GraphError(f"{node_text(node)}: {message}")
