"""Which weights are not made small: what a general precision may give single matrices at least, and what stays in fp32."""

from __future__ import annotations

from ..errors import GraphError
from .ir import Graph, Value


def least_formats(graph: Graph) -> dict[str, str]:
    """Name of a weight -> the format that it is not made smaller than, unless the user names it.

    `kv_b` of latent attention: once absorbed, its key half is multiplied the other way round, across the columns that a group
    of a 4-bit format shares a scale along. The indexer's queries and keys: a token that is not chosen is not a small error.
    """
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "mla_attention":
            names[node.weights[0]] = "int8"
        elif node.op in ("index_choose", "index_write"):
            names[_made_by(graph, node.inputs[0])] = "int8"
    return names


def _made_by(graph: Graph, value: Value) -> str:
    """The matrix whose product this is, before it was normed and turned."""
    node = graph.producer(value)
    while node is not None and node.op in ("rope", "layer_norm"):
        value = node.inputs[0]
        node = graph.producer(value)
    if node is None or node.op != "linear":
        raise GraphError(f"{value.name!r} is not made by a product")
    return node.weights[node.outputs.index(value)]


def exact_weights(graph: Graph) -> frozenset[str]:
    """Names of weights that are never packed and kept in fp32, as Transformers keeps them: routers and their biases, and the
    weights of the indexer's heads. They are small, and decide which experts and which tokens are looked at at all."""
    names: set[str | None] = set()
    for node in graph.nodes:
        if node.op == "router":
            names.update((*node.weights, node.attrs["bias"]))
        if node.op == "index_choose":
            names.add(_made_by(graph, node.inputs[1]))
    return frozenset(name for name in names if name is not None)
