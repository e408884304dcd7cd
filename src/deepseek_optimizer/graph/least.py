"""Weights that need more precision than the others: the smallest format that each allows, and those that stay in fp32."""

from __future__ import annotations

from ..errors import GraphError
from .ir import Graph, Value


def least_formats(graph: Graph) -> dict[str, str]:
    """Name of a weight -> the smallest format that it is packed in, unless the user names the weight.

    `kv_b` of latent attention: in the absorbed form its key half is multiplied transposed, across the groups along which a
    4-bit format shares scales. The indexer's queries and keys: missing a token that should be chosen is a large error.
    """
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "mla_attention":
            names[node.weights[0]] = "int8"
        elif node.op in ("index_choose", "index_write"):
            names[_made_by(graph, node.inputs[0])] = "int8"
    return names


def _made_by(graph: Graph, value: Value) -> str:
    """The matrix whose product this is, before normalisation and RoPE."""
    node = graph.producer(value)
    while node is not None and node.op in ("rope", "layer_norm"):
        value = node.inputs[0]
        node = graph.producer(value)
    if node is None or node.op != "linear":
        raise GraphError(f"{value.name!r} is not made by a product")
    return node.weights[node.outputs.index(value)]


def exact_weights(graph: Graph) -> frozenset[str]:
    """Names of weights that are never packed but stored in fp32, as in Transformers: routers and their biases, and the weights
    of the indexer's heads. They are small, and decide which experts and tokens are used at all."""
    names: set[str | None] = set()
    for node in graph.nodes:
        if node.op == "router":
            names.update((*node.weights, node.attrs["bias"]))
        if node.op == "index_choose":
            names.add(_made_by(graph, node.inputs[1]))
    return frozenset(name for name in names if name is not None)
