"""Checks that a graph is well formed: every op of a known shape, values made before they are read, widths that fit.

Families and rules are checked by it in tests, and backends call it before they compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import GraphError
from .attention_mode import BLOCK
from .ir import CacheSpec, Graph, LatentSpec, Node, Value
from .printing import node_text


@dataclass(frozen=True)
class _Op:
    """inputs, outputs, weights: how many (None: any number from 1; inputs: one of several). attrs: which must be there.
    widths: whether they fit."""

    inputs: int | tuple[int, ...]
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
    return x == y == _heads(node, "heads") and table + node.attrs.get("offset", 0) <= node.attrs["head_dim"]


def _cache(node: Node, graph: Graph) -> bool:
    return all(v.width == _heads(node, "kv_heads") for v in node.inputs) and _fits_cache(node, graph)


def _rope_cache(node: Node, graph: Graph) -> bool:
    q, k, v, table = (value.width for value in node.inputs)
    heads = q == node.outputs[0].width == _heads(node, "heads") and k == v == _heads(node, "kv_heads")
    return heads and table <= node.attrs["head_dim"] and _fits_cache(node, graph)


def _attention(node: Node, graph: Graph) -> bool:
    a, (q, *chosen) = node.attrs, node.inputs
    fits = q.width == node.outputs[0].width == _heads(node, "heads") and a["heads"] % a["kv_heads"] == 0
    by_blocks = all(c.width % a["kv_heads"] == 0 for c in chosen)
    form = a["softmax"] == "online" or (a["softmax"] == "eager" and not (chosen or a.get("sinks", 0)))
    return fits and by_blocks and form and _span(node) and _fits_cache(node, graph)


def _span(node: Node) -> bool:
    """Whether a row's tokens are all, a window with its sinks, or those chosen, and not two of these."""
    window, sinks = node.attrs.get("window", 0), node.attrs.get("sinks", 0)
    return window >= 0 and sinks >= 0 and (window > 0 or not sinks) and not (window and len(node.inputs) > 1)


def _choice(node: Node, graph: Graph) -> bool:
    """Whether blocks are left to choose beside those of sinks and window, and what they are chosen by is kept."""
    a = node.attrs
    always = -(-a["sinks"] // BLOCK) + -(-a["window"] // BLOCK) + 1
    return a["sinks"] >= 0 and a["window"] >= 1 and always < a["blocks"] and graph.cache.summaries


def _block_choose(node: Node, graph: Graph) -> bool:
    a = node.attrs
    widths = node.inputs[0].width, node.outputs[0].width
    fits = widths == (_heads(node, "heads"), a["kv_heads"] * a["blocks"]) and a["heads"] % a["kv_heads"] == 0
    return fits and _choice(node, graph) and _fits_cache(node, graph)


def _latent_choose(node: Node, graph: Graph) -> bool:
    a, spec = node.attrs, _in_latent_cache(node, graph)
    widths = node.inputs[0].width, node.outputs[0].width
    fits = widths == (a["heads"] * (a["nope"] + a["rope"]), BLOCK * a["blocks"])
    return spec is not None and (a["rank"], a["rope"]) == (spec.rank, spec.rope) and fits and _choice(node, graph)


def _fits_cache(node: Node, graph: Graph) -> bool:
    a, spec = node.attrs, graph.cache
    if not isinstance(spec, CacheSpec):
        return False
    return 0 <= a["layer"] < spec.layers and (a["kv_heads"], a["head_dim"]) == (spec.kv_heads, spec.head_dim)


def _in_latent_cache(node: Node, graph: Graph) -> LatentSpec | None:
    """The spec of the latent cache, if there is one and the node's layer lies in it."""
    spec = graph.cache
    return spec if isinstance(spec, LatentSpec) and 0 <= node.attrs["layer"] < spec.layers else None


def _latent(node: Node, graph: Graph) -> bool:
    spec, (x, table), y = graph.cache, (v.width for v in node.inputs), node.outputs[0].width
    fits = isinstance(spec, LatentSpec) and (node.attrs["rank"], table) == (spec.rank, spec.rope)
    return fits and x == y == node.attrs["rank"] + table


def _latent_write(node: Node, graph: Graph) -> bool:
    spec = _in_latent_cache(node, graph)
    return spec is not None and node.inputs[0].width == spec.rank + spec.rope


def _mla_attention(node: Node, graph: Graph) -> bool:
    a, spec = node.attrs, _in_latent_cache(node, graph)
    widths = node.inputs[0].width, node.outputs[0].width
    fits = widths == (a["heads"] * (a["nope"] + a["rope"]), a["heads"] * a["v_dim"])
    known = a["form"] in ("expanded", "absorbed")
    return spec is not None and (a["rank"], a["rope"]) == (spec.rank, spec.rope) and fits and known and _span(node)


def _index_write(node: Node, graph: Graph) -> bool:
    spec = _in_latent_cache(node, graph)
    return spec is not None and node.inputs[0].width == spec.index > 0


def _index_choose(node: Node, graph: Graph) -> bool:
    a, spec = node.attrs, _in_latent_cache(node, graph)
    (q, w), chosen = (v.width for v in node.inputs), node.outputs[0].width
    return spec is not None and a["index"] == spec.index and (q, w, chosen) == (a["heads"] * a["index"], a["heads"], a["top_k"])


def _router(node: Node, _: Graph) -> bool:
    a = node.attrs
    grouped = 1 <= a["top_groups"] <= a["groups"] and a["experts"] % a["groups"] == 0
    enough = grouped and a["top_k"] <= a["top_groups"] * (a["experts"] // a["groups"])
    known = a["scoring"] in ("softmax", "sigmoid") and a["group_score"] in ("max", "top2")
    return enough and known and node.outputs[0].width == 2 * a["top_k"]


def _experts(node: Node, _: Graph) -> bool:
    many = node.outputs[0] if node.op == "experts_gate_up" else node.inputs[0]
    top_k = int(node.attrs["top_k"])
    return node.inputs[1].width == 2 * top_k and many.repeat == top_k <= node.attrs["experts"]


def _concat(node: Node, _: Graph) -> bool:
    return sum(v.width for v in node.inputs) == node.outputs[0].width


_HEADS = ("layer", "heads", "kv_heads", "head_dim")
_MLA = ("layer", "heads", "nope", "rope", "rank", "v_dim")
_CHOICE = ("blocks", "sinks", "window")
_ROUTER = ("bias", "experts", "top_k", "groups", "top_groups", "scoring", "group_score", "normalise", "scale")
# What a node writes of its layer's cache, and which must be there before another reads it.
_WRITES = {"cache_write": "cache", "rope_cache": "cache", "latent_write": "latents", "index_write": "index keys"}
_READS = {
    "attention": "cache", "block_choose": "cache", "mla_attention": "latents", "latent_choose": "latents",
    "index_choose": "index keys",
}  # fmt: skip
# Ops whose rows are the tokens, not the selected ones.
_TOKEN_ROWS = {
    "embedding", "state_in", "rope_table", "latent", "hidden_out", "router", "experts_gate_up", "experts_down",
}  # fmt: skip
_TOKEN_ROWS |= {*_WRITES, *_READS}
_OPS = {
    "embedding": _Op(0, 1, 1, ("scale",), lambda n, g: n.outputs[0].width == g.hidden_size),
    "rms_norm": _Op(1, 1, 1, ("eps",), _same),
    "head_norm": _Op(1, 1, 1, ("eps", "heads", "head_dim"), _head_norm),
    "linear": _Op(1, None, None, ("biases",), lambda n, g: len(n.outputs) == len(n.weights) == len(n.attrs["biases"])),
    "rope_table": _Op(0, 1, 0, ("rope",), lambda n, g: n.outputs[0].width == n.attrs["rope"].rot),
    "rope": _Op(2, 1, 0, ("heads", "head_dim", "interleaved"), _rope),
    "cache_write": _Op(2, 0, 0, ("layer", "kv_heads", "head_dim"), _cache),
    "rope_cache": _Op(4, 1, 0, (*_HEADS, "interleaved"), _rope_cache),
    "attention": _Op((1, 2), 1, 0, (*_HEADS, "scale", "window", "softmax"), _attention),
    "block_choose": _Op(1, 1, 0, (*_HEADS, *_CHOICE), _block_choose),
    "swiglu": _Op(2, 1, 0, (), _same),
    "gate_up": _Op(1, 1, 2, ("biases",), lambda n, g: len(n.attrs["biases"]) == 2),
    "add": _Op(2, 1, 0, (), _same),
    "add_rms_norm": _Op(2, 2, 1, ("eps",), _same),
    "select_rows": _Op(1, 1, 0, (), _same),
    "layer_norm": _Op(1, 1, 2, ("eps",), _same),
    "concat": _Op(2, 1, 0, (), _concat),
    "state_in": _Op(0, 1, 0, (), lambda n, g: n.outputs[0].width == g.hidden_size),
    "latent": _Op(2, 1, 1, ("eps", "rank", "interleaved"), _latent),
    "latent_write": _Op(1, 0, 0, ("layer",), _latent_write),
    "mla_attention": _Op((1, 2), 1, 1, (*_MLA, "scale", "form"), _mla_attention),
    "latent_choose": _Op(1, 1, 1, (*_MLA, *_CHOICE), _latent_choose),
    "index_write": _Op(1, 0, 0, ("layer",), _index_write),
    "index_choose": _Op(2, 1, 0, ("layer", "heads", "index", "top_k", "scale"), _index_choose),
    "router": _Op(1, 1, 1, _ROUTER, _router),
    "experts_gate_up": _Op(2, 1, 1, ("experts", "top_k", "grouped"), _experts),
    "experts_down": _Op(2, 1, 1, ("experts", "top_k", "grouped"), _experts),
    "hidden_out": _Op(1, 0, 0, ("index",), lambda n, g: n.inputs[0].width == g.hidden_size),
    "lm_head": _Op(1, 1, 1, ("bias",), lambda n, g: (n.inputs[0].width, n.outputs[0].width) == (g.hidden_size, g.vocab_size)),
}  # fmt: skip


def check_graph(graph: Graph) -> None:
    """Raises GraphError, with the node's text, at the first thing that is wrong."""
    made: dict[str, Value] = {}
    written: set[tuple[str, int]] = set()
    for node in graph.nodes:
        _check_node(node, graph)
        for value in node.inputs:
            if made.get(value.name) != value:
                raise _error(node, f"reads {value.name!r}, which no node before it makes in this form")
        _check_order(node, written)
        for value in node.outputs:
            if value.name in made:
                raise _error(node, f"makes {value.name!r} a second time")
            made[value.name] = value
    _check_results(graph)


def _check_order(node: Node, written: set[tuple[str, int]]) -> None:
    """A layer's part of the cache is written once, and before it is read; `written` grows."""
    if node.op in _READS and (_READS[node.op], node.attrs["layer"]) not in written:
        raise _error(node, f"reads the {_READS[node.op]} of a layer before it is written")
    if node.op in _WRITES:
        place = (_WRITES[node.op], node.attrs["layer"])
        if place in written:
            raise _error(node, f"writes the {place[0]} of a layer a second time")
        written.add(place)


def _check_node(node: Node, graph: Graph) -> None:
    op = _OPS.get(node.op)
    if op is None:
        raise _error(node, f"no such op; known: {', '.join(_OPS)}")
    for what, have, want in (
        ("inputs", len(node.inputs), op.inputs),
        ("outputs", len(node.outputs), op.outputs),
        ("weights", len(node.weights), op.weights),
    ):
        wrong = have < 1 if want is None else have not in (want if isinstance(want, tuple) else (want,))
        if wrong:
            raise _error(node, f"has {have} {what}, needs {'some' if want is None else want}")
    missing = [name for name in op.attrs if name not in node.attrs]
    if missing:
        raise _error(node, f"lacks {', '.join(missing)}")
    if not op.widths(node, graph):
        raise _error(node, f"widths {[v.width for v in (*node.inputs, *node.outputs)]} do not fit")
    _check_rows(node)


def _check_rows(node: Node) -> None:
    """Rows are the tokens everywhere before select_rows, and the selected ones after it; only experts have several a token."""
    inputs, outputs = ({v.selected for v in values} for values in (node.inputs, node.outputs))
    if node.op == "select_rows":
        fits = inputs == {False} and outputs == {True}
    else:
        fits = len(inputs | outputs) == 1 and not (node.op in _TOKEN_ROWS and True in inputs | outputs)
    if not fits:
        raise _error(node, "mixes token rows and selected rows")
    many = {"experts_gate_up": node.outputs, "experts_down": node.inputs[:1]}.get(node.op, ())
    if any(v.repeat != 1 for v in (*node.inputs, *node.outputs) if v not in many):
        raise _error(node, "takes or makes several rows a token")


def _check_results(graph: Graph) -> None:
    heads = [n for n in graph.nodes if n.op == "lm_head"]
    if len(heads) > 1:
        raise GraphError(f"a graph has at most one lm_head, this one has {len(heads)}")
    indices = sorted(n.attrs["index"] for n in graph.nodes if n.op == "hidden_out")
    if indices != list(range(graph.hidden_states)):
        raise GraphError(f"hidden_out needs indices 0 to {graph.hidden_states - 1}, each once; has {indices}")


def _error(node: Node, message: str) -> GraphError:
    return GraphError(f"{node_text(node)}: {message}")
