"""Lowering: decides which values of a native plan are bf16, q8 or q16 rows, and where they are converted.

A product reads its input in the kind that its weight's format requires. If all readers of a value need the same kind, the op
that computes the value writes that kind directly (a norm that quantizes its result); otherwise a `convert` step converts it,
once per kind. Ops over several matrices are split if their formats need different kinds. A product and the GELU of its result
become one op, a router an fp32 product and a choice. The last node's output is the caller's logits, if the graph has a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...graph.ir import Graph, Node, Value
from ...graph.ops import spec_of
from ...graph.ops.products import GATED
from ..kv_b import key_stack, value_stack
from .adapter_products import with_low_rank_parts
from .mla_weights import absorbs


def lower(graph: Graph, kind_of: Callable[[str], str], format_of: Callable[[str], str]) -> Graph:
    """The same graph with slot kinds and `convert` nodes.

    Args:
        graph: the graph before lowering.
        kind_of: weight name -> slot kind that its product reads ("f32", "bf16", "q8", "q16").
        format_of: weight name -> format name; gate_up needs equal formats.
    """
    nodes = _once(part for node in graph.nodes for part in _split(node, kind_of, format_of))
    nodes = _with_activations(with_low_rank_parts(nodes, format_of))
    wanted = _wanted_kinds(nodes, kind_of)
    in_place = {
        v: kinds[0] for v, kinds in wanted.items() if len(kinds) == 1 and kinds[0] != "f32" and _writes_any_kind(nodes, v)
    }
    lowered: list[Node] = []
    for node in nodes:
        lowered.append(_rewire(node, kind_of, in_place))
        for value in node.outputs:
            if value not in in_place:
                lowered += [Node("convert", (value,), (_as(value, k),)) for k in wanted.get(value, ()) if k != "f32"]
    return replace(graph, nodes=_with_tail(lowered))


def _once(nodes: Iterable[Node]) -> list[Node]:
    """Drops nodes whose outputs an earlier node computes: a choice and its attention share the absorbed queries."""
    unique: list[Node] = []
    computed: set[Value] = set()
    for node in nodes:
        if not node.outputs or not computed.issuperset(node.outputs):
            unique.append(node)
            computed.update(node.outputs)
    return unique


def _with_activations(nodes: list[Node]) -> list[Node]:
    """linear(x) -> y; gelu(y) -> h  =>  linear_gelu(x) -> h, if nothing else reads y; the same for gelu_erf."""
    readers = Counter(value for node in nodes for value in node.inputs)
    products = {node.outputs[0]: node for node in nodes if node.op == "linear" and len(node.weights) == 1}
    merged: list[Node] = []
    dropped: set[Value] = set()
    for node in nodes:
        if node.op in ("gelu", "gelu_erf") and readers[y := node.inputs[0]] == 1 and (product := products.get(y)):
            dropped.add(y)
            node = product.with_(op="linear_gelu", outputs=node.outputs, attrs={**product.attrs, "activation": node.op})
        merged.append(node)
    return [node for node in merged if node.op != "linear" or node.outputs[0] not in dropped]


def _with_tail(nodes: list[Node]) -> list[Node]:
    """The nodes with those of `_after_head`, before the exchange of logits if the head computes some of them only."""
    at = next((i for i, node in enumerate(nodes) if node.op == "lm_head"), None)
    if at is None or not (tail := _after_head(nodes[at])):
        return nodes
    (before,), (after,) = nodes[at].outputs, tail[-1].outputs
    rest = [
        node.with_(
            inputs=tuple(after if value == before else value for value in node.inputs),
            outputs=tuple(replace(value, selected=after.selected) for value in node.outputs),
        )
        for node in nodes[at + 1 :]
    ]
    return [*nodes[: at + 1], *tail, *rest]


def _after_head(head: Node) -> list[Node]:
    """Scaling and limiting of logits. Without the rule `last_logits` the head runs on every token, and a node selects the
    requested rows of its output first."""
    tail: list[Node] = []
    value = head.outputs[0]
    if not value.selected:
        rows = replace(value, name=f"{value.name}.rows", selected=True)
        tail.append(Node("select_rows", (value,), (rows,)))
        value = rows
    for op, factor, needed in (
        ("scale", head.attrs.get("scale", 1.0), head.attrs.get("scale", 1.0) != 1.0),
        ("softcap", head.attrs.get("softcap", 0.0), head.attrs.get("softcap", 0.0) > 0),
    ):
        if needed:
            result = replace(value, name=f"{value.name}.{op}")
            tail.append(Node(op, (value,), (result,), attrs={"scale": factor}))
            value = result
    return tail


def _as(value: Value, kind: str) -> Value:
    return value if kind == "f32" else replace(value, name=f"{value.name}.{kind}", kind=kind)


def _split(node: Node, kind_of: Callable[[str], str], format_of: Callable[[str], str]) -> list[Node]:
    """Splits a node: a linear over several matrices into one node per kind; a gate_up with different formats into linears and
    the activation; a router into a linear and the choice."""
    biases = node.attrs.get("biases") or (None,) * len(node.weights)
    if node.op == "linear" and len(node.weights) > 1:
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(node.weights):
            groups.setdefault(kind_of(name), []).append(i)
        if len(groups) > 1:
            return [_linear(node, indices, biases) for indices in groups.values()]
    if node.op == "gate_up" and format_of(node.weights[0]) != format_of(node.weights[1]):
        out = node.outputs[0]
        halves = tuple(replace(out, name=f"{out.name}.{part}") for part in ("gate", "up"))
        pair = node.with_(outputs=halves)
        gated = GATED[node.attrs.get("activation", "silu")]
        return [_linear(pair, [0], biases), _linear(pair, [1], biases), Node(gated, halves, node.outputs)]
    if node.op == "all_reduce":
        return [Node("publish", node.inputs), Node("sum_parts", (), node.outputs)]
    if node.op == "all_gather":
        return [Node("publish", node.inputs), Node("join_parts", (), node.outputs, attrs={"each": node.attrs["each"]})]
    if absorbs(node):
        return _absorbed(node)
    if node.op == "latent_choose":
        absorb = _absorb(node, node.outputs[0].width)
        return [*absorb, node.with_(inputs=absorb[-1].outputs, weights=())]
    if node.op in ("router", "hash_router"):
        routes = node.outputs[0]
        scores = replace(routes, name=f"{routes.name}.scores", width=node.attrs["experts"])
        return [
            Node("linear", node.inputs, (scores,), node.weights[:1], {"biases": node.attrs.get("biases", (None,))}),
            node.with_(
                op={"router": "route", "hash_router": "hash_route"}[node.op],
                inputs=(scores,),
                weights=node.weights[1:],
                attrs={n: v for n, v in node.attrs.items() if n != "biases"},
            ),
        ]
    return [node]


def _absorbed(node: Node) -> list[Node]:
    """Absorbed attention: queries to the latent space, attention, and sums of latents to values. Rows that the step expands
    instead bypass both products."""
    (q, *chosen), (out,), (kv_b,), a = node.inputs, node.outputs, node.weights, node.attrs
    span = (chosen[0].width if chosen else 0, a.get("window", 0), a.get("sinks", 0))
    absorb, shape = _absorb(node, *span), {**_absorbed_shape(node, *span), "scale": a["scale"]}
    sums, expanded = Value(f"{out.name}.latents", a["heads"] * a["rank"]), Value(f"{out.name}.expanded", out.width)
    value = Node("mla_value", (sums, expanded), (out,), (value_stack(kv_b),), shape)
    return [
        *absorb,
        node.with_(inputs=(q, *absorb[-1].outputs, *chosen), outputs=(sums, expanded), attrs=shape),
        *_adapted(node, value, 1, a["rank"], a["v_dim"]),
    ]


def _absorb(node: Node, top_k: int, window: int = 0, sinks: int = 0) -> list[Node]:
    """Maps queries to the latent space, for attention with this top_k or window. The last node computes the result."""
    a, q = node.attrs, node.inputs[0]
    absorbed = Value(f"{q.name}.absorbed", a["heads"] * (a["rank"] + a["rope"]))
    shape = _absorbed_shape(node, top_k, window, sinks)
    absorb = Node("mla_absorb", (q,), (absorbed,), (key_stack(node.weights[0]),), shape)
    return _adapted(node, absorb, 0, a["nope"], a["rank"])


def _absorbed_shape(node: Node, top_k: int, window: int, sinks: int) -> dict[str, Any]:
    """The attributes that the nodes of absorbed attention share."""
    shape = {name: node.attrs[name] for name in ("layer", "heads", "nope", "rope", "rank", "v_dim")}
    return {**shape, "form": "absorbed", "top_k": top_k, "window": window, "sinks": sinks}


def _adapted(attention: Node, product: Node, part: int, inputs: int, outputs: int) -> list[Node]:
    """The product of every head with what adapters add to it.

    Args:
        attention: the node of the graph, with attributes `site` and `lora_rank` if it has adapters.
        part: 0: it has the keys of heads; 1: the values.
        inputs, outputs: elements of a head that it reads and writes, the first ones.
    """
    a = attention.attrs
    if a.get("site", -1) < 0:
        return [product]
    x, (y,), heads, rank = product.inputs[0], product.outputs, a["heads"], a["lora_rank"]
    base, h = replace(y, name=f"{y.name}.base"), Value(f"{y.name}.lora", heads * rank)
    of_site = {"site": a["site"] + part, "rank": rank, "heads": heads}
    return [
        Node("lora_down", (x,), (h,), attrs={**of_site, "head_dim": x.width // heads, "elements": inputs}),
        product.with_(outputs=(base,)),
        Node("lora_up", (h, base), (y,), attrs={**of_site, "head_dim": y.width // heads, "elements": outputs}),
    ]


def _linear(node: Node, indices: list[int], biases: tuple[str | None, ...]) -> Node:
    return Node(
        "linear", node.inputs, tuple(node.outputs[i] for i in indices), tuple(node.weights[i] for i in indices),
        {"biases": tuple(biases[i] for i in indices)},
    )  # fmt: skip


def _wanted_kinds(nodes: list[Node], kind_of: Callable[[str], str]) -> Mapping[Value, list[str]]:
    """Value -> the kinds that its readers need, in order of first use."""
    wanted: dict[Value, dict[str, None]] = {}
    for node in nodes:
        for value, kind in zip(node.inputs, _read_kinds(node, kind_of), strict=True):
            wanted.setdefault(value, {})[kind] = None
    return {value: list(kinds) for value, kinds in wanted.items()}


def _read_kinds(node: Node, kind_of: Callable[[str], str]) -> list[str]:
    """The kinds in which a node reads its inputs: the rows of a product in that of its weight; what an adapter's A makes of
    rows of bf16 or int8 in bf16; everything else in fp32."""
    product = spec_of(node).product
    weight = node.weights[0] if product else node.attrs.get("beside")
    first = "f32" if weight is None else kind_of(weight)
    adapted = product and "site" in node.attrs
    further = "bf16" if adapted and first in ("bf16", "q8") else "f32"
    return [first, *(further for _ in node.inputs[1:])] if node.inputs else []


def _writes_any_kind(nodes: list[Node], value: Value) -> bool:
    """Whether the node that computes the value can write any slot kind."""
    producer = next((n for n in nodes if value in n.outputs), None)
    if producer is None:
        return False
    index = spec_of(producer).any_kind
    return index is not None and producer.outputs[index] == value


def _rewire(node: Node, kind_of: Callable[[str], str], in_place: Mapping[Value, str]) -> Node:
    inputs = tuple(map(_as, node.inputs, _read_kinds(node, kind_of)))
    return node.with_(inputs=inputs, outputs=tuple(_as(v, in_place.get(v, "f32")) for v in node.outputs))
