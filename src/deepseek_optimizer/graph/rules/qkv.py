"""One projection where an attention has several over one input: it is read (and quantised) once, and one step shares out all
their rows. These are q, k and v; or, of latent attention, what makes the query and the latent, and the indexer's key, which
read the layer's input, and the queries of attention and indexer, which read one latent.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir import Graph, Node, Value
from .edit import Links, rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """linear(x) -> q; linear(x) -> k; linear(x) -> v  =>  linear(x) -> q, k, v, for each attention of one input."""
    links, changes, places = Links(graph), dict[int, Node | None](), []
    for layer, indices in _projections(graph, links):
        parts = [graph.nodes[i] for i in indices]
        merged = Node(
            "linear", parts[0].inputs, tuple(p.outputs[0] for p in parts), tuple(p.weights[0] for p in parts),
            {"biases": tuple(p.attrs["biases"][0] for p in parts)},
        )  # fmt: skip
        changes.update(dict.fromkeys(indices))
        changes[min(indices)] = merged
        places.append(f"layer {layer}")
    return rebuilt(graph, changes), list(dict.fromkeys(places))


def _projections(graph: Graph, links: Links) -> Iterator[tuple[int, list[int]]]:
    """Layer, and indices of projections that are to be one."""
    writes = {(n.op, n.attrs["layer"]): n.inputs for n in graph.nodes if n.op.endswith("_write")}
    chosen = {n.attrs["layer"]: n for n in graph.nodes if n.op == "index_choose"}
    for node in graph.nodes:
        layer = node.attrs.get("layer", -1)
        if node.op == "attention" and ("cache_write", layer) in writes:  # not where rope_cache came first
            sources = [links.source(v, ("rope", "head_norm")) for v in (node.inputs[0], *writes["cache_write", layer])]
            found = _over_one_input(graph, sources)
            if len(found) == 1 and len(found[0]) == 3:
                yield layer, found[0]
        elif node.op == "mla_attention":
            q = links.source(node.inputs[0], ("rope",))
            latent = links.source(writes["latent_write", layer][0], ("latent",))
            index = [chosen[layer].inputs[0], writes["index_write", layer][0]] if layer in chosen else []
            down = links.source(graph.nodes[q].inputs[0], ("rms_norm",))  # where q goes through a latent of its own
            more = [links.source(v, ("rope", "layer_norm")) for v in index]
            for group in _over_one_input(graph, [q, down, latent, *more]):
                if len(group) > 1:
                    yield layer, group


def _over_one_input(graph: Graph, indices: list[int]) -> list[list[int]]:
    """Those of the nodes that are linear and not merged yet, by the input that they read."""
    groups: dict[Value, list[int]] = {}
    for i in dict.fromkeys(indices):
        node = graph.nodes[i]
        if node.op == "linear" and len(node.weights) == 1:
            groups.setdefault(node.inputs[0], []).append(i)
    return list(groups.values())
