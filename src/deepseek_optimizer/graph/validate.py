"""Checks that a graph is well formed: every op of a known shape, values made before they are read, widths that fit.

Families and rules are checked by it in tests, and backends call it before they compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import GraphError
from .ir import Graph, Node, Value
from .printing import node_text


@dataclass(frozen=True)
class _Op:
    """inputs, outputs, weights: how many (None: any number from 1). attrs: which must be there. widths: whether they fit."""

    inputs: int
    outputs: int | None
    weights: int | None
    attrs: tuple[str, ...]
    widths: Callable[[Node, Graph], bool]


def _same(node: Node, _: Graph) -> bool:
    return len({v.width for v in (*node.inputs, *node.outputs)}) == 1


def _any(_: Node, __: Graph) -> bool:
    return True


def _heads(node: Node, count: str) -> int:
    return int(node.attrs[count] * node.attrs["head_dim"])


def _head_norm(node: Node, graph: Graph) -> bool:
    return _same(node, graph) and node.inputs[0].width == _heads(node, "heads")


def _rope(node: Node, _: Graph) -> bool:
    x, table, y = node.inputs[0].width, node.inputs[1].width, node.outputs[0].width
    return x == y == _heads(node, "heads") and table <= node.attrs["head_dim"]


def _cache(node: Node, graph: Graph) -> bool:
    return all(v.width == _heads(node, "kv_heads") for v in node.inputs) and _fits_cache(node, graph)


def _rope_cache(node: Node, graph: Graph) -> bool:
    q, k, v, table = (value.width for value in node.inputs)
    heads = q == node.outputs[0].width == _heads(node, "heads") and k == v == _heads(node, "kv_heads")
    return heads and table <= node.attrs["head_dim"] and _fits_cache(node, graph)


def _attention(node: Node, graph: Graph) -> bool:
    grouped = node.attrs["heads"] % node.attrs["kv_heads"] == 0
    return _same(node, graph) and node.inputs[0].width == _heads(node, "heads") and grouped and _fits_cache(node, graph)


def _fits_cache(node: Node, graph: Graph) -> bool:
    a, spec = node.attrs, graph.cache
    return 0 <= a["layer"] < spec.layers and (a["kv_heads"], a["head_dim"]) == (spec.kv_heads, spec.head_dim)


_HEADS = ("layer", "heads", "kv_heads", "head_dim")
_OPS = {
    "embedding": _Op(0, 1, 1, ("scale",), lambda n, g: n.outputs[0].width == g.hidden_size),
    "rms_norm": _Op(1, 1, 1, ("eps",), _same),
    "head_norm": _Op(1, 1, 1, ("eps", "heads", "head_dim"), _head_norm),
    "linear": _Op(1, None, None, ("biases",), lambda n, g: len(n.outputs) == len(n.weights) == len(n.attrs["biases"])),
    "rope_table": _Op(0, 1, 0, ("rope",), lambda n, g: n.outputs[0].width == n.attrs["rope"].rot),
    "rope": _Op(2, 1, 0, ("heads", "head_dim", "interleaved"), _rope),
    "cache_write": _Op(2, 0, 0, ("layer", "kv_heads", "head_dim"), _cache),
    "rope_cache": _Op(4, 1, 0, (*_HEADS, "interleaved"), _rope_cache),
    "attention": _Op(1, 1, 0, (*_HEADS, "scale", "window", "softmax"), _attention),
    "swiglu": _Op(2, 1, 0, (), _same),
    "gate_up": _Op(1, 1, 2, ("biases",), lambda n, g: len(n.attrs["biases"]) == 2),
    "add": _Op(2, 1, 0, (), _same),
    "add_rms_norm": _Op(2, 2, 1, ("eps",), _same),
    "select_rows": _Op(1, 1, 0, (), _same),
    "hidden_out": _Op(1, 0, 0, ("index",), lambda n, g: n.inputs[0].width == g.hidden_size),
    "lm_head": _Op(1, 1, 1, ("bias",), lambda n, g: (n.inputs[0].width, n.outputs[0].width) == (g.hidden_size, g.vocab_size)),
}  # fmt: skip


def check_graph(graph: Graph) -> None:
    """Raises GraphError, with the node's text, at the first thing that is wrong."""
    made: dict[str, Value] = {}
    written: set[int] = set()
    for node in graph.nodes:
        _check_node(node, graph)
        for value in node.inputs:
            if made.get(value.name) != value:
                raise _error(node, f"reads {value.name!r}, which no node before it makes in this form")
        if node.op == "attention" and node.attrs["layer"] not in written:
            raise _error(node, "reads the cache of a layer before it is written")
        if node.op in ("cache_write", "rope_cache"):
            if node.attrs["layer"] in written:
                raise _error(node, "writes the cache of a layer a second time")
            written.add(node.attrs["layer"])
        for value in node.outputs:
            if value.name in made:
                raise _error(node, f"makes {value.name!r} a second time")
            made[value.name] = value
    _check_results(graph)


def _check_node(node: Node, graph: Graph) -> None:
    op = _OPS.get(node.op)
    if op is None:
        raise _error(node, f"no such op; known: {', '.join(_OPS)}")
    for what, have, want in (
        ("inputs", len(node.inputs), op.inputs),
        ("outputs", len(node.outputs), op.outputs),
        ("weights", len(node.weights), op.weights),
    ):
        if have != want if want is not None else have < 1:
            raise _error(node, f"has {have} {what}, needs {'some' if want is None else want}")
    missing = [name for name in op.attrs if name not in node.attrs]
    if missing:
        raise _error(node, f"lacks {', '.join(missing)}")
    if not op.widths(node, graph):
        raise _error(node, f"widths {[v.width for v in (*node.inputs, *node.outputs)]} do not fit")
    _check_rows(node)


def _check_rows(node: Node) -> None:
    """Rows are the tokens everywhere before select_rows, and the selected ones after it."""
    inputs, outputs = ({v.selected for v in values} for values in (node.inputs, node.outputs))
    if node.op == "select_rows":
        fits = inputs == {False} and outputs == {True}
    else:
        token_rows = node.op in ("embedding", "rope_table", "cache_write", "rope_cache", "attention", "hidden_out")
        fits = len(inputs | outputs) == 1 and not (token_rows and True in inputs | outputs)
    if not fits:
        raise _error(node, "mixes token rows and selected rows")


def _check_results(graph: Graph) -> None:
    heads = [n for n in graph.nodes if n.op == "lm_head"]
    if len(heads) != 1:
        raise GraphError(f"a graph needs one lm_head, this one has {len(heads)}")
    indices = sorted(n.attrs["index"] for n in graph.nodes if n.op == "hidden_out")
    if indices != list(range(graph.hidden_states)):
        raise GraphError(f"hidden_out needs indices 0 to {graph.hidden_states - 1}, each once; has {indices}")


def _error(node: Node, message: str) -> GraphError:
    return GraphError(f"{node_text(node)}: {message}")
