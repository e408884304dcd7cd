"""Parts of a graph: the rest from one of its hidden states on, to recompute late layers from stored states of earlier ones;
its beginning, as far as later tokens need it; and some of the layers of an encoder."""

from __future__ import annotations

from dataclasses import replace

from .ir import CacheSpec, Graph, Node, Value
from .ops import spec_of


def graph_from_hidden_state(graph: Graph, index: int) -> Graph:
    """The graph from hidden state `index` on, which is passed as `inputs_embeds`.

    Hidden states are renumbered from there on; the cache keeps all its layers. If later nodes read the embeddings themselves,
    these are looked up by token ids.

    Args:
        graph: unfused; rules may be applied to the result.
        index: as in `hidden_out`. The last one is normalized already, and only the head follows. See `latest_start`.
    """
    state, earlier, rest = _split(graph, index)
    embedding = next(n for n in graph.nodes if n.op == "embedding")
    later = [n.with_(attrs={"index": n.attrs["index"] - index}) if n.op == "hidden_out" else n for n in rest]
    by_ids = {"scale": embedding.attrs["scale"], "entries": graph.vocab_size}
    earlier = [n.with_(op="lookup", attrs=by_ids) if n is embedding else n for n in earlier]
    nodes = [embedding.with_(outputs=(state,)), *earlier, *later]
    return replace(graph, nodes=nodes, hidden_states=graph.hidden_states - index)


def latest_start(graph: Graph, index: int) -> int:
    """The largest index up to `index` from which the rest of the graph can be computed: it reads only the cache of layers that
    it writes itself, and no result that an earlier layer computed from its cache (tokens that it chose)."""
    while index:
        _, earlier, rest = _split(graph, index)
        read, written = ({n.attrs["layer"] for n in rest if getattr(spec_of(n), access)} for access in ("reads", "writes"))
        if read <= written and not any(spec_of(n).reads for n in earlier):
            break
        index -= 1
    return index


def writing_graph(graph: Graph) -> Graph | None:
    """The nodes that a token's part of the cache depends on, without logits; its only hidden state is the embedding.

    None if fewer than a quarter of the layers follow the last one that writes to the cache, or if the graph has recurrent
    states or sites of adapters.

    Args:
        graph: with or without rules applied.
    """
    places = [i for i, n in enumerate(graph.nodes) if spec_of(n).writes is not None]
    if graph.states or graph.adapter_sites or not places:
        return None
    following = sum(n.op == "hidden_out" for n in graph.nodes[places[-1] :]) - 1  # without the rest of the layer that writes
    if following < 1 or 4 * following < graph.hidden_states - 1:
        return None
    writes = [graph.nodes[i] for i in places]
    wanted = {value for node in writes for value in node.inputs}
    needed = {id(n) for n in (*writes, *_needed(graph.nodes, wanted))}
    nodes = [n for n in graph.nodes if id(n) in needed or (n.op == "hidden_out" and n.attrs["index"] == 0)]
    return replace(graph, nodes=nodes, hidden_states=1)


def graph_between(graph: Graph, begin: int, end: int) -> Graph:
    """The graph of an encoder from hidden state `begin`, which is passed as `states`, to hidden state `end`, its only one.

    Args:
        graph: unfused; rules may be applied to the result.
        begin, end: as in `hidden_out`.
    """
    state, earlier, rest = _split(graph, begin)
    nodes = [Node("state_in", (), (state,)), *earlier]
    for node in rest:
        if node.op != "hidden_out":
            nodes.append(node)
        elif node.attrs["index"] == end:
            nodes.append(node.with_(attrs={"index": 0}))
            break
    return replace(graph, nodes=nodes, hidden_states=1)


def halves_over_cache(layer: Graph) -> tuple[Graph, Graph]:
    """A layer of an encoder as two graphs over a cache of one layer, for steps over some of the rows of a sequence: the first
    writes their keys and values, the second computes their results, once those of all rows of the sequence are written.

    A step of the second one passes its rows as the last ones of the sequence (`context_len`), and lets each of them see all
    (`visible_to`).

    Args:
        layer: unfused, from `graph_between`, with one `encoder_attention` without a window; rules may be applied to the
            results.
    """
    at = next(i for i, node in enumerate(layer.nodes) if node.op == "encoder_attention")
    attention = layer.nodes[at]
    (q, k, v), a = attention.inputs, attention.attrs
    cache = CacheSpec(1, a["kv_heads"], a["head_dim"])
    heads = {"layer": 0, "kv_heads": a["kv_heads"], "head_dim": a["head_dim"]}
    begin = Node("hidden_out", layer.nodes[0].outputs, attrs={"index": 0})
    write = [*_needed(layer.nodes[:at], {k, v}), begin, Node("cache_write", (k, v), attrs=heads)]
    read = Node(
        "attention", (q,), attention.outputs,
        attrs={**heads, "heads": a["heads"], "scale": a["scale"], "window": 0, "softmax": "online"},
    )  # fmt: skip
    rest = layer.nodes[at + 1 :]
    before = _needed(layer.nodes[:at], {q, *(value for node in rest for value in node.inputs)})
    return replace(layer, nodes=write, cache=cache), replace(layer, nodes=[*before, read, *rest], cache=cache, written=(0,))


def _split(graph: Graph, index: int) -> tuple[Value, list[Node], list[Node]]:
    """Hidden state `index`, the nodes before it whose other results are needed later, and the nodes from it on."""
    at = next(i for i, n in enumerate(graph.nodes) if n.op == "hidden_out" and n.attrs["index"] == index)
    state, rest = graph.nodes[at].inputs[0], graph.nodes[at:]
    return state, _needed(graph.nodes[:at], {value for node in rest for value in node.inputs} - {state}), rest


def _needed(nodes: list[Node], wanted: set[Value]) -> list[Node]:
    """Those of `nodes` that the wanted values depend on (such as RoPE's table)."""
    needed = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            needed.append(node)
            wanted = wanted.union(node.inputs)
    return needed[::-1]
