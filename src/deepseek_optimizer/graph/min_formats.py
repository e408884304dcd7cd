"""Weights that need more precision than others: their smallest format, and those that stay in fp32."""

from __future__ import annotations

from ..errors import GraphError
from .ir import Graph, RowsSpec, Value


def min_formats(graph: Graph) -> dict[str, str]:
    """The smallest format of weights that need more precision, by name. A format that the user sets for a weight overrides it.

    `kv_b` of latent attention: in the absorbed form its key half is multiplied transposed, across the groups that share scales
    in 4-bit formats. The indexer's queries and keys: missing a token that should be chosen is a large error. The gates of the
    delta rule: small, and they decide how long a state remembers. What entries of compressed attention are computed from: an
    error in an entry stays for the whole text.
    """
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "mla_attention":
            names[node.weights[0]] = "int8"
        elif node.op in ("index_choose", "index_write", "entries_choose"):
            names[_matrix_of(graph, node.inputs[0])] = "int8"
        elif node.op == "rows_write" and (both := graph.producer(node.inputs[0])) is not None and both.op == "concat":
            names.update(dict.fromkeys((_matrix_of(graph, value) for value in both.inputs), "int8"))
        elif node.op == "delta_rule":
            names.update(dict.fromkeys((_matrix_of(graph, gate) for gate in node.inputs[1:]), "int8"))
    return names


def _matrix_of(graph: Graph, value: Value) -> str:
    """The matrix whose product this value is, before normalization and RoPE."""
    node = graph.producer(value)
    while node is not None and node.op in ("rope", "layer_norm", "columns", "lora_up"):
        value = node.inputs[1 if node.op == "lora_up" else 0]
        node = graph.producer(value)
    if node is None or node.op != "linear":
        raise GraphError(f"{value.name!r} is not the result of a product")
    return node.weights[node.outputs.index(value)]


def exact_weights(graph: Graph) -> frozenset[str]:
    """Names of weights that are never packed but stored in fp32, as in Transformers: routers and their biases, and the weights
    of the indexer's heads, which decide which experts and tokens are used, those of gates with one value per row, and those of
    hyper-connections. They are small."""
    names: set[str | None] = set()
    for node in graph.nodes:
        if node.op == "router":
            names.update((*node.weights, node.attrs["bias"], *node.attrs.get("biases", ())))
        if node.op == "hash_router":
            names.add(node.weights[0])
        if node.op == "stream_weights":
            names.add(_matrix_of(graph, node.inputs[0]))
        if node.op in ("index_choose", "entries_choose") or (node.op == "sigmoid_gate" and node.inputs[1].width == 1):
            names.add(_matrix_of(graph, node.inputs[1]))
    return frozenset(name for name in names if name is not None)


def fp32_weights(graph: Graph) -> frozenset[str]:
    """Those of `exact_weights` that a model holds in fp32, whatever its dtype is. DeepSeek-V4's routers and indexers are not
    among them: Transformers multiplies them with hidden states of the model's dtype, and its own code must be able to run."""
    if not isinstance(graph.cache, RowsSpec):
        return exact_weights(graph)
    routers = {node.weights[0] for node in graph.nodes if node.op in ("router", "hash_router")}
    heads = {_matrix_of(graph, node.inputs[1]) for node in graph.nodes if node.op == "entries_choose"}
    return exact_weights(graph) - routers - heads
