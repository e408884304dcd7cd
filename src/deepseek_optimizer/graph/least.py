"""Which weights are not made small: what a general precision may give single matrices at least, and what stays in fp32."""

from __future__ import annotations

from .ir import Graph


def least_formats(graph: Graph) -> dict[str, str]:
    """Name of a weight -> the format that it is not made smaller than, unless the user names it.

    `kv_b` of latent attention: once absorbed, its key half is multiplied the other way round, across the columns that a group
    of a 4-bit format shares a scale along.
    """
    return {node.weights[0]: "int8" for node in graph.nodes if node.op == "mla_attention"}


def exact_weights(graph: Graph) -> frozenset[str]:
    """Names of weights that are never packed and kept in fp32, as Transformers keeps them: routers and their biases, and the
    weights of the indexer's heads. They are small, and decide which experts and which tokens are looked at at all."""
    names: set[str | None] = set()
    for node in graph.nodes:
        if node.op == "router":
            names.update((*node.weights, node.attrs["bias"]))
        if node.op == "index_choose" and (source := graph.producer(node.inputs[1])) is not None:
            names.add(source.weights[source.outputs.index(node.inputs[1])])
    return frozenset(name for name in names if name is not None)
