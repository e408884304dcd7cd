"""The graph of a layer for multi-token prediction, which predicts one token further ahead.

Its input for each token is the last hidden state of the model (or of the previous MTP layer) and the embedding of the next
token. Source: DeepSeek-V3 (2024), section 2.2; Transformers' MtpLayer.
"""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import CacheSpec, Graph, LatentSpec, Node, Value
from .blocks import Attend, FeedForward, decoder_layer, emit, linear, norm
from .decoder import Trunk


def mtp_graph(
    d: Trunk, cache: CacheSpec | LatentSpec, attend: Attend, feed_forward: FeedForward, depth: int, layers: int
) -> Graph:
    """The unfused graph of MTP layer `depth` of `layers`. In the cache, MTP layers follow the model's decoder layers.

    Its only hidden state is its normalized output, which is the input of the next MTP layer."""
    layer = d.layers + depth
    name, path = f"l{layer}", f"model.layers.{layer}"
    nodes: list[Node] = []
    embedded = emit(nodes, "embedding", (), "embed", d.hidden, f"{path}.embed_tokens.weight", scale=1.0)
    table = emit(nodes, "rope_table", (), "rope", d.rope.rot, rope=d.rope)
    embedded = norm(nodes, d, embedded, f"{name}.embed_norm", f"{path}.enorm")
    state = emit(nodes, "state_in", (), "state", d.hidden)
    state = norm(nodes, d, state, f"{name}.state_norm", f"{path}.hnorm")
    both = emit(nodes, "concat", (embedded, state), f"{name}.both", 2 * d.hidden)
    x: Value = linear(nodes, both, f"{name}.in", d.hidden, f"{path}.eh_proj")
    x = decoder_layer(nodes, d, x, table, layer, attend, feed_forward)
    normed = norm(nodes, d, x, "final", f"{path}.shared_head.norm")
    nodes.append(Node("hidden_out", (normed,), attrs={"index": 0}))
    emit(nodes, "lm_head", (normed,), "logits", d.vocab, f"{path}.shared_head.head.weight", bias=None)
    return Graph(d.family, nodes, d.vocab, d.hidden, 1, replace(cache, layers=cache.layers + layers), d.max_positions)


def with_draft_vocabulary(graph: Graph, size: int) -> Graph:
    """The graph of an MTP layer whose head has rows for `size` tokens only."""
    nodes = [n.with_(outputs=(replace(n.outputs[0], width=size),)) if n.op == "lm_head" else n for n in graph.nodes]
    return replace(graph, nodes=nodes, draft_vocab_size=size)
