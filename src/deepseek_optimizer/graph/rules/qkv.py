"""Merges an attention's projections of one input into one operation: the input is read (and quantized) once, and the rows of
all matrices are divided among the threads together.

These are q, k and v. With latent attention, they are the projections of the layer's input for the query, the latent and the
indexer's key, and those of the query latent for the queries of attention and indexer. With compressed attention, they also are
those that entries are computed from.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir import Graph, Node, Value
from ..ops.products import merged_rows
from .edit import Links, rebuilt

MAX_MATRICES = 3  # of one node, in native plans


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """linear(x) -> q; linear(x) -> k; linear(x) -> v  =>  linear(x) -> q, k, v, for each attention or recurrence of one
    input; only q and k where v is computed from k's product."""
    links, changes, places = Links(graph), dict[int, Node | None](), []
    for place, indices in _projections(graph, links):
        parts = [graph.nodes[i] for i in indices]
        merged = Node(
            "linear", parts[0].inputs, tuple(p.outputs[0] for p in parts), tuple(p.weights[0] for p in parts),
            {"biases": tuple(p.attrs["biases"][0] for p in parts), **merged_rows(parts)},
        )  # fmt: skip
        changes.update(dict.fromkeys(indices))
        changes[min(indices)] = merged
        places.append(place)
    return rebuilt(graph, changes), list(dict.fromkeys(places))


def _projections(graph: Graph, links: Links) -> Iterator[tuple[str, list[int]]]:
    """Yields the place and the indices of projections to merge."""
    writes = {(n.op, n.attrs["layer"]): n.inputs for n in graph.nodes if n.op.endswith("_write")}
    chosen = {n.attrs["layer"]: n for n in graph.nodes if n.op == "index_choose"}
    compressed = [n for n in graph.nodes if n.op == "compressed_attention"]
    for node in graph.nodes:
        layer = node.attrs.get("layer", -1)
        if node.op == "attention" and ("cache_write", layer) in writes:  # not if rope_cache was applied before
            through = ("rope", "head_norm", "rms_norm", "columns", "position_scale")
            sources = [links.source(v, through) for v in (node.inputs[0], *writes["cache_write", layer])]
            groups = _over_one_input(graph, sources)
            if len(groups) == 1 and len(groups[0]) > 1:
                yield f"layer {layer}", groups[0]
        elif node.op == "encoder_attention":
            groups = _over_one_input(graph, [links.source(v, ("rope",)) for v in node.inputs])
            if len(groups) == 1 and len(groups[0]) == 3:
                yield node.outputs[0].name, groups[0]
        elif node.op == "short_conv":
            source = graph.nodes[links.source(node.inputs[0], ("multiply", "concat", "columns"))]
            both = [i for value in source.inputs for i in links.readers(value) if source.op == "linear"]
            for group in _over_one_input(graph, both):
                for chunk in (group[i : i + MAX_MATRICES] for i in range(0, len(group), MAX_MATRICES)):
                    if len(chunk) > 1:
                        yield f"state {node.attrs['state']}", chunk
        elif node.op == "mla_attention":
            q = links.source(node.inputs[0], ("rope", "position_scale"))
            latent = links.source(writes["latent_write", layer][0], ("latent",))
            index = [chosen[layer].inputs[0], writes["index_write", layer][0]] if layer in chosen else []
            down = links.source(graph.nodes[q].inputs[0], ("rms_norm",))  # if queries have a latent of their own
            more = [links.source(v, ("rope", "layer_norm")) for v in index]
            for group in _over_one_input(graph, [q, down, latent, *more]):
                if len(group) > 1:
                    yield f"layer {layer}", group
        elif node.op == "compressed_attention":
            for sources in _compressed(graph, links, node):
                for group in _over_one_input(graph, sources):
                    if len(group) > 1:
                        yield f"layer {compressed.index(node)}", group


def _compressed(graph: Graph, links: Links, node: Node) -> Iterator[list[int]]:
    """Yields the indices of the projections of compressed attention and its indexer, and of each compressor, which checkpoints
    store in other formats. The weights of the indexer's heads are left out, since they are exact."""
    rows = {n.attrs["layer"]: n.inputs[0] for n in graph.nodes if n.op == "rows_write"}
    compressors = {n.attrs["layer"]: rows[n.attrs["source"]] for n in graph.nodes if n.op == "compress"}
    q = links.source(node.inputs[0], ("rope", "head_norm"))
    down = links.source(graph.nodes[q].inputs[0], ("rms_norm",))
    own = [q, down, links.source(rows[node.attrs["layer"]], ("rope", "rms_norm"))]
    entries = [node.attrs["entries"]]
    if len(node.inputs) > 1:
        choice = graph.nodes[links.producer(node.inputs[1])]
        own.append(links.source(choice.inputs[0], ("rope",)))
        entries.append(choice.attrs["layer"])
    yield own
    for kind in entries:
        if kind in compressors:
            yield [links.producer(value) for value in graph.nodes[links.producer(compressors[kind])].inputs]


def _over_one_input(graph: Graph, indices: list[int]) -> list[list[int]]:
    """The indices of linear nodes that are not merged yet, grouped by their input."""
    groups: dict[Value, list[int]] = {}
    for i in dict.fromkeys(indices):
        node = graph.nodes[i]
        if node.op == "linear" and len(node.weights) == 1:
            groups.setdefault(node.inputs[0], []).append(i)
    return list(groups.values())
